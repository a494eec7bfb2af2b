//! CLIP's tokenizer, built from vocab.json and merges.txt: the repository ships no tokenizer.json.

use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::model::ModelFiles;

/// How CLIP cuts text into words (openai/CLIP `simple_tokenizer.py`, in transformers' spelling).
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A prompt as the text encoder takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Start token, text, end token, padding: always of the model's full length.
    pub ids: Vec<u32>,
    /// How many of them are no padding, which stands behind: start token, text, end token. Where transformers' attention mask is 1.
    pub visible: usize,
    /// What was left out, where the prompt was too long to be used whole.
    pub cut: Option<Cut>,
}

/// The end of a prompt that the model does not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// How many tokens it has; of a prompt of more than 64 KiB, at least.
    pub tokens: usize,
    /// Its first words, as the user wrote them.
    pub begins: String,
}

/// Bytes of a prompt that are looked at: a thousand times what a model reads.
const MOST_TEXT: usize = 1 << 16;
/// The most entries of a vocabulary, and merges of two; CLIP has 49,408.
const MOST_WORDS: usize = 1 << 20;

/// Text to token ids, the same ids as transformers' CLIPTokenizer gives.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    length: usize,
}

/// What `special_tokens_map.json` and `tokenizer_config.json` may say; either file may be absent.
#[derive(Default, Deserialize)]
struct Special {
    bos_token: Option<Value>,
    eos_token: Option<Value>,
    unk_token: Option<Value>,
    pad_token: Option<Value>,
    model_max_length: Option<f64>,
}

/// A special token is a plain string or an object with `content`.
fn content(token: &Option<Value>) -> Option<&str> {
    match token.as_ref()? {
        Value::String(text) => Some(text),
        Value::Object(fields) => fields.get("content")?.as_str(),
        _ => None,
    }
}

impl Tokenizer {
    /// Reads `tokenizer/`. `positions` is the number of positions that the text encoder has.
    ///
    /// # Errors
    /// vocab.json or merges.txt is missing or damaged, or the vocabulary lacks a special token.
    pub fn new(files: &ModelFiles, positions: usize) -> Result<Self> {
        let vocab: HashMap<String, u32> = files.json("tokenizer/vocab.json")?;
        ensure!(
            vocab.len() <= MOST_WORDS,
            "{} holds {} tokens; expected at most {MOST_WORDS}",
            files.name("tokenizer/vocab.json"),
            vocab.len()
        );
        let special: Special = match files.try_read("tokenizer/special_tokens_map.json")? {
            Some(_) => files.json("tokenizer/special_tokens_map.json")?,
            None => Special::default(),
        };
        let config: Special = match files.try_read("tokenizer/tokenizer_config.json")? {
            Some(_) => files.json("tokenizer/tokenizer_config.json")?,
            None => Special::default(),
        };
        let name = |from_map: &Option<Value>, from_config: &Option<Value>, default: &str| {
            content(from_map)
                .or(content(from_config))
                .unwrap_or(default)
                .to_string()
        };
        let start = name(&special.bos_token, &config.bos_token, "<|startoftext|>");
        let end = name(&special.eos_token, &config.eos_token, "<|endoftext|>");
        let unknown = name(&special.unk_token, &config.unk_token, "<|endoftext|>");
        let pad = name(&special.pad_token, &config.pad_token, "<|endoftext|>");
        let id = |key: &str, token: &str| {
            vocab.get(token).copied().ok_or_else(|| {
                anyhow!(
                    "{}: the special token `{token}` ({key}) is not in the vocabulary",
                    files.name("tokenizer/vocab.json")
                )
            })
        };
        let (start_id, end_id, pad_id) = (
            id("bos_token", &start)?,
            id("eos_token", &end)?,
            id("pad_token", &pad)?,
        );
        id("unk_token", &unknown)?;
        let model = BPE::builder()
            .vocab_and_merges(
                vocab
                    .clone()
                    .into_iter()
                    .collect::<tokenizers::models::bpe::Vocab>(),
                merges(files)?,
            )
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix("</w>".into())
            .unk_token(unknown.clone())
            .build()
            .map_err(|error| anyhow!(error))
            .with_context(|| {
                format!(
                    "{} and merges.txt do not belong together",
                    files.name("tokenizer/vocab.json")
                )
            })?;
        let mut inner = tokenizers::Tokenizer::new(model);
        prepare(&mut inner, vec![start, end, unknown, pad]).map_err(|error| anyhow!(error))?;
        // transformers writes 1e30 where a tokenizer has no limit of its own
        let limit = config
            .model_max_length
            .filter(|limit| (2.0..1e6).contains(limit))
            .map_or(positions, |limit| limit as usize);
        Ok(Self {
            inner,
            start: start_id,
            end: end_id,
            pad: pad_id,
            length: limit.min(positions),
        })
    }

    /// The ids of `text`, cut to the model's length and padded to it.
    ///
    /// # Errors
    /// The tokenizer's own; none is known for valid UTF-8.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let looked_at = beginning(text.trim_start(), MOST_TEXT);
        let encoding = self
            .inner
            .encode(looked_at, false)
            .map_err(|error| anyhow!(error))
            .context("cannot tokenize the prompt")?;
        let room = self.length.saturating_sub(2);
        let words = encoding.get_ids();
        let cut = (words.len() > room).then(|| Cut {
            tokens: words.len() - room,
            begins: first_words(looked_at, &encoding, room),
        });
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.start);
        ids.extend(words.iter().take(room));
        ids.push(self.end);
        let visible = ids.len();
        ids.resize(self.length, self.pad);
        Ok(Tokens { ids, visible, cut })
    }
}

/// The beginning of a text, of at most `most` bytes.
fn beginning(text: &str, most: usize) -> &str {
    let mut ends = (0..=most.min(text.len())).rev();
    let end = ends.find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// The first words of the part of `text` behind its first `room` tokens, as the user wrote them, in one line.
fn first_words(text: &str, encoding: &tokenizers::Encoding, room: usize) -> String {
    let offsets = encoding.get_offsets();
    let start = offsets.get(room).map_or(0, |(start, _)| *start);
    let rest = text.get(start..).unwrap_or(text);
    let words = rest
        .split_whitespace()
        .take(8)
        .collect::<Vec<_>>()
        .join(" ");
    let shown = beginning(&words, 60);
    let whole = shown.len() == words.len() && rest.split_whitespace().nth(8).is_none();
    if whole {
        shown.to_owned()
    } else {
        format!("{} ...", shown.trim_end())
    }
}

/// What CLIP does to text before its merges: one kind of space, lower case, words, bytes. `special` are its special tokens.
fn prepare(
    tokenizer: &mut tokenizers::Tokenizer,
    mut special: Vec<String>,
) -> tokenizers::Result<()> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    tokenizer.with_normalizer(Some(Normalizers::new(vec![
        NormalizerWrapper::NFC(NFC),
        NormalizerWrapper::Replace(spaces),
        NormalizerWrapper::Lowercase(Lowercase),
    ])))?;
    let words = Split::new(
        SplitPattern::Regex(WORDS.into()),
        SplitDelimiterBehavior::Removed,
        true,
    )?;
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ])));
    special.dedup();
    let special = special.into_iter();
    tokenizer.add_special_tokens(special.map(|name| AddedToken::from(name, true)))?;
    Ok(())
}

fn merges(files: &ModelFiles) -> Result<Vec<(String, String)>> {
    let name = "tokenizer/merges.txt";
    let text = String::from_utf8(files.read(name)?)
        .with_context(|| format!("{} is not UTF-8", files.name(name)))?;
    ensure!(
        text.lines().count() <= MOST_WORDS,
        "{} has more than {MOST_WORDS} lines",
        files.name(name)
    );
    text.lines()
        .filter(|line| !line.starts_with("#version") && !line.trim().is_empty())
        .map(|line| {
            let (left, right) = line.split_once(' ').ok_or_else(|| {
                anyhow!(
                    "{}: `{line}` is not a merge of two tokens",
                    files.name(name)
                )
            })?;
            Ok((left.to_string(), right.trim_end().to_string()))
        })
        .collect()
}
