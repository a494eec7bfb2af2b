//! Prompts to their conditioning, kept between pictures.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::DType;

use super::embeds::PromptEmbeds;
use super::loaded::loaded;
use super::types::{Event, OnEvent, Settings, Stage, check_finite, floats};
use crate::device::Placement;
use crate::model::ModelFiles;
use crate::networks::text::{Conditioning, TextEncoder, Tokenizer, Tokens};

/// Prompts whose conditioning is kept between pictures.
const PROMPTS_KEPT: usize = 16;

/// The conditionings of the prompts seen last.
#[derive(Default)]
pub struct Prompts {
    kept: HashMap<String, Encoded>,
}

/// One prompt.
enum Row<'a> {
    /// For the text encoder.
    Words(&'a str),
    /// From one.
    Numbers(&'a Conditioning),
}

impl<'a> Row<'a> {
    fn words(&self) -> Option<&'a str> {
        match *self {
            Row::Words(text) => Some(text),
            Row::Numbers(_) => None,
        }
    }
}

/// What a prompt became.
struct Encoded {
    conditioning: Conditioning,
    /// Tokens that are no padding.
    visible: usize,
}

impl Prompts {
    /// Forgets all, as when the precision changes.
    pub fn clear(&mut self) {
        self.kept.clear();
    }

    /// What the run's prompt is to the UNet, one row; with guidance above 1 the negative prompt's comes before it. Where padding is
    /// masked each has its own number of tokens.
    ///
    /// # Errors
    /// The text encoder cannot be read, or its result is not finite.
    pub fn conditioning(
        &mut self,
        settings: &Settings,
        model: &ModelFiles,
        placement: &Placement,
        on_event: OnEvent,
    ) -> Result<Vec<Conditioning>> {
        let given = match settings.guidance {
            0.0 => None,
            _ => settings.prompt_embeds.as_ref(),
        };
        let prompt = match (settings.guidance, given) {
            (0.0, _) => Row::Words(""),
            (_, Some(embeds)) => Row::Numbers(embeds.prompt()),
            (_, None) => Row::Words(&settings.prompt),
        };
        let negative = (settings.guidance > 1.0).then(|| {
            let given = given.and_then(PromptEmbeds::negative);
            given.map_or(Row::Words(&settings.negative_prompt), Row::Numbers)
        });
        let rows: Vec<Row> = negative.into_iter().chain([prompt]).collect();
        let texts: Vec<&str> = rows.iter().filter_map(Row::words).collect();
        // In a batch the prompts are nearly always the same; kept is what they became, not the network.
        let mut networks = None;
        for &text in &texts {
            if self.kept.contains_key(text) {
                continue;
            }
            let (tokenizer, encoder) = loaded(&mut networks, Stage::Text, on_event, || {
                let encoder = TextEncoder::load(model, placement)?;
                Ok((Tokenizer::new(model, encoder.positions())?, encoder))
            })?;
            on_event(Event::Started(Stage::Text))?;
            let encoded = encode(text, tokenizer, encoder, placement.dtype, on_event)?;
            self.keep(text, encoded, &texts);
        }
        let conditioning = |row: &Row| match *row {
            Row::Numbers(numbers) => numbers.to(placement),
            Row::Words(text) => {
                let Encoded {
                    conditioning,
                    visible,
                } = &self.kept[text];
                if settings.mask_padding {
                    conditioning.masked(*visible)
                } else {
                    Ok(conditioning.clone())
                }
            }
        };
        rows.iter().map(conditioning).collect()
    }

    /// Keeps a conditioning, beside at most [`PROMPTS_KEPT`] others: a folder may bring a prompt a file, each of a
    /// quarter of a megabyte. Those `in_use` stay.
    fn keep(&mut self, text: &str, encoded: Encoded, in_use: &[&str]) {
        if self.kept.len() >= PROMPTS_KEPT {
            self.kept.retain(|kept, _| in_use.contains(&&**kept));
        }
        self.kept.insert(text.to_string(), encoded);
    }
}

/// Says what of a prompt `model` does not read.
pub fn warn_of_cut(
    model: &str,
    tokens: &Tokens,
    positions: usize,
    on_event: OnEvent,
) -> Result<()> {
    let Some(cut) = &tokens.cut else {
        return Ok(());
    };
    on_event(Event::Warning(format!(
        "the prompt is longer than the {positions} tokens that the {model} reads; {} tokens were left out, from \"{}\"",
        cut.tokens, cut.begins
    )))
}

fn encode(
    text: &str,
    tokenizer: &Tokenizer,
    encoder: &TextEncoder,
    dtype: DType,
    on_event: OnEvent,
) -> Result<Encoded> {
    let tokens = tokenizer.encode(text)?;
    warn_of_cut("model", &tokens, encoder.positions(), on_event)?;
    let conditioning = encoder.encode(&tokens)?;
    check_finite(&floats(&conditioning.pooled)?, Stage::Text, dtype)?;
    Ok(Encoded {
        conditioning,
        visible: tokens.visible,
    })
}
