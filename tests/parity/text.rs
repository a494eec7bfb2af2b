//! A prompt: its token ids, and what the text encoder makes of them.

use candle_core::DType;
use sd_upscale::ModelFiles;
use sd_upscale::networks::text::{TextEncoder, Tokenizer, Tokens};

use crate::STAGE;
use crate::common::*;

#[test]
fn token_ids_are_those_of_transformers_for_every_text() {
    let text = std::fs::read(data("reference/tokenizer.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for (name, folder) in [("small", "model"), ("full", "")] {
        let files = ModelFiles::Folder(data(folder));
        let tokenizer = Tokenizer::new(&files, 77).unwrap();
        let rows = cases[name].as_array().unwrap();
        assert!(rows.len() > 20, "few texts in tokenizer.json");
        for row in rows {
            let text = row["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(tokens.ids, ids, "{name} vocabulary, text {text:?}");
            assert_eq!(
                tokens.cut.is_some(),
                row.get("cut").is_some(),
                "{name} vocabulary: whether {text:?} is too long"
            );
        }
    }
}

#[test]
fn the_warning_of_a_long_prompt_tells_where_it_was_cut_and_how_much_in_one_line() {
    let tokenizer = Tokenizer::new(&ModelFiles::Folder(data("")), 77).unwrap();
    let words: Vec<String> = (0..75).map(|_| "cat".to_string()).collect();
    let text = format!("{} Behind the END", words.join(" "));
    let cut = tokenizer.encode(&text).unwrap().cut.unwrap();
    assert_eq!(cut.begins, "Behind the END");
    assert!(cut.tokens >= 3);
    // However long, and whatever the words.
    for (word, times) in [
        ("cat\n", 2500),
        ("Üß日本", 2500),
        ("x", 20_000_000),
        (" \t", 9),
    ] {
        let text = format!("{text} {}", word.repeat(times));
        let cut = tokenizer.encode(&text).unwrap().cut.unwrap();
        assert!(cut.begins.starts_with("Behind the END"), "{cut:?}");
        assert!(
            cut.begins.len() < 70 && !cut.begins.contains('\n'),
            "{cut:?}"
        );
        assert!(word.trim().is_empty() || cut.tokens > 100, "{cut:?}");
    }
}

#[test]
fn text_encoder() {
    let reference = Reference::read("text");
    for (name, placement) in placements(DType::F32) {
        let encoder = TextEncoder::load(&model(), &placement).unwrap();
        for prompt in ["cat", "empty", "long"] {
            let ids = reference.get(&format!("{prompt}.ids"));
            let ids = ids.flatten_all().unwrap().to_dtype(DType::U32).unwrap();
            let tokens = Tokens {
                ids: ids.to_vec1().unwrap(),
                visible: 77,
                cut: None,
            };
            let result = encoder.encode(&tokens).unwrap();
            for (part, actual) in [("context", result.context), ("pooled", result.pooled)] {
                let key = format!("{prompt}.{part}");
                assert_close(
                    &format!("{name} {key}"),
                    &actual,
                    &reference.get(&key),
                    STAGE,
                );
            }
        }
    }
}
