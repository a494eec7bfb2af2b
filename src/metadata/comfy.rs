//! ComfyUI's `prompt`, the graph of nodes that made a picture: finds the texts behind its sampler.

use std::collections::{HashSet, VecDeque};

use serde_json::{Map, Value};

use crate::metadata::FoundPrompt;
use crate::metadata::a1111::found;

/// The most text, in bytes, that is collected from one graph; 75 tokens of it count.
const MOST_TEXT: usize = 1 << 20;

/// Reads ComfyUI's `prompt`, a graph of nodes: the texts that the sampler behind the saved picture was given.
pub fn from_graph(json: &str) -> Option<FoundPrompt> {
    // Python writes NaN, which is no JSON.
    let graph: Value = serde_json::from_str(json)
        .or_else(|_| serde_json::from_str(&json.replace("NaN", "null").replace("Infinity", "null")))
        .ok()?;
    let mut graph = Graph {
        nodes: graph.as_object()?,
        budget: 2000,
        room: MOST_TEXT,
    };
    let sampler = graph.sampler()?;
    let positive = graph.input(sampler, &["positive", "conditioning"])?;
    let prompt = graph.conditioning(positive, Side::Positive);
    let negative = graph
        .input(sampler, &["negative"])
        .map(|link| graph.conditioning(link, Side::Negative));
    found(&prompt, &negative.unwrap_or_default(), "a ComfyUI graph")
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Positive,
    Negative,
}

/// ComfyUI's nodes by id. A node's input is a value or a link `[id, output slot]`.
struct Graph<'a> {
    nodes: &'a Map<String, Value>,
    /// Visits left: a made-up graph may hold loops, or diamonds with endless paths.
    budget: usize,
    /// Bytes of text left to collect: the same text may be joined to itself at every visit.
    room: usize,
}

/// A link's target and output slot.
type Link<'a> = (&'a str, u64);

impl<'a> Graph<'a> {
    fn inputs(&self, id: &str) -> Option<&'a Map<String, Value>> {
        self.nodes.get(id)?.get("inputs")?.as_object()
    }

    fn class(&self, id: &str) -> &'a str {
        self.nodes
            .get(id)
            .and_then(|n| n.get("class_type")?.as_str())
            .unwrap_or_default()
    }

    fn input(&self, id: &str, names: &[&str]) -> Option<Link<'a>> {
        let inputs = self.inputs(id)?;
        names.iter().find_map(|name| link(inputs.get(*name)?))
    }

    /// Whether a node takes the prompts: every sampler, and the guiders of `SamplerCustomAdvanced`.
    fn takes_prompts(&self, id: &str) -> bool {
        let sampler = self.input(id, &["positive"]).is_some();
        sampler
            || (self.class(id).contains("Guider") && self.input(id, &["conditioning"]).is_some())
    }

    /// The sampler nearest upstream of a node that saves pictures, else the first of the graph.
    fn sampler(&mut self) -> Option<&'a str> {
        let nodes = self.nodes;
        let ids = || nodes.keys().map(String::as_str);
        let saves = |id: &&str| {
            let class = self.class(id);
            class.contains("Save") || class.contains("Preview")
        };
        let mut queue: VecDeque<&str> = ids().filter(saves).collect();
        let mut seen: HashSet<&str> = queue.iter().copied().collect();
        while let Some(id) = queue.pop_front() {
            if self.takes_prompts(id) {
                return Some(id);
            }
            for (next, _) in self
                .inputs(id)
                .into_iter()
                .flat_map(Map::values)
                .filter_map(link)
            {
                if seen.insert(next) {
                    queue.push_back(next);
                }
            }
        }
        ids()
            .filter(|id| self.class(id).contains("Sampler"))
            .find(|id| self.takes_prompts(id))
    }

    /// The text behind a conditioning, through whatever nodes pass it on.
    fn conditioning(&mut self, (id, slot): Link<'a>, side: Side) -> String {
        let Some(inputs) = self.visit(id) else {
            return String::new();
        };
        if self.class(id) == "ConditioningZeroOut" {
            return String::new();
        }
        // Nodes that pass on both (ControlNetApplyAdvanced) give the positive at slot 0, the negative at slot 1.
        let both = link(inputs.get("positive").unwrap_or(&Value::Null))
            .zip(link(inputs.get("negative").unwrap_or(&Value::Null)));
        if let Some((positive, negative)) = both {
            return self.conditioning(if slot == 1 { negative } else { positive }, side);
        }
        if self.class(id).contains("TextEncode") || !has_conditioning(inputs) {
            return self.text_of(inputs, side);
        }
        let links: Vec<Link> = inputs
            .iter()
            .filter(|(k, _)| is_conditioning(k))
            .filter_map(|(_, v)| link(v))
            .collect();
        let texts = links.into_iter().map(|link| self.conditioning(link, side));
        join(texts.collect(), ", ")
    }

    /// The text among a node's inputs, given outright or by links to string nodes.
    fn text_of(&mut self, inputs: &'a Map<String, Value>, side: Side) -> String {
        // Loaders that encode too name both texts; SDXL's encoder has two texts, mostly equal.
        let named: &[&str] = match side {
            Side::Positive => &["positive", "positive_prompt", "text_positive"],
            Side::Negative => &["negative", "negative_prompt", "text_negative"],
        };
        let keys = named.iter().chain(&[
            "text", "text_g", "text_l", "prompt", "string", "value", "clip_l", "t5xxl",
        ]);
        for key in keys {
            let text = inputs
                .get(*key)
                .map(|value| self.string(value, side))
                .unwrap_or_default();
            if !text.is_empty() {
                return text;
            }
        }
        // Nodes that join strings number them.
        let delimiter = inputs
            .get("delimiter")
            .and_then(Value::as_str)
            .unwrap_or(", ");
        let parts = inputs
            .iter()
            .filter(|(k, _)| k.starts_with("string") || k.starts_with("text"));
        let parts: Vec<String> = parts.map(|(_, value)| self.string(value, side)).collect();
        let between = delimiter.len().saturating_mul(parts.len());
        self.room = self.room.saturating_sub(between);
        match self.room {
            0 => String::new(),
            _ => join(parts, delimiter),
        }
    }

    fn string(&mut self, value: &'a Value, side: Side) -> String {
        match (value, link(value)) {
            (Value::String(text), _) => match self.room.checked_sub(text.len()) {
                Some(left) => {
                    self.room = left;
                    text.clone()
                }
                None => String::new(),
            },
            (_, Some((id, _))) => self
                .visit(id)
                .map(|inputs| self.text_of(inputs, side))
                .unwrap_or_default(),
            _ => String::new(),
        }
    }

    fn visit(&mut self, id: &str) -> Option<&'a Map<String, Value>> {
        self.budget = self.budget.checked_sub(1)?;
        self.inputs(id)
    }
}

fn is_conditioning(key: &str) -> bool {
    key.starts_with("conditioning") || key.starts_with("cond")
}

fn has_conditioning(inputs: &Map<String, Value>) -> bool {
    inputs
        .iter()
        .any(|(key, value)| is_conditioning(key) && link(value).is_some())
}

fn link(value: &Value) -> Option<Link<'_>> {
    match value.as_array()?.as_slice() {
        [Value::String(id), slot] => Some((id, slot.as_u64()?)),
        _ => None,
    }
}

fn join(texts: Vec<String>, between: &str) -> String {
    let texts: Vec<&str> = texts
        .iter()
        .map(String::as_str)
        .filter(|t| !t.trim().is_empty())
        .collect();
    texts.join(between)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn comfy(graph: Value) -> Option<(String, String)> {
        from_graph(&graph.to_string()).map(|f| (f.prompt, f.negative))
    }

    #[test]
    fn the_advanced_samplers_guider_leads_to_the_prompts() {
        let text = |t: &str| json!({"class_type": "CLIPTextEncode", "inputs": {"text": t, "clip": ["1", 1]}});
        let graph = json!({
            "2": text("a cat"), "3": text("blurry"),
            "4": {"class_type": "CFGGuider", "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0]}},
            "5": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["4", 0], "noise": ["9", 0]}},
            "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0]}},
            "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0]}},
        });
        assert_eq!(comfy(graph), Some(("a cat".into(), "blurry".into())));
    }

    #[test]
    fn the_sampler_behind_the_saved_picture_is_the_one_that_counts() {
        let text = |t: &str| json!({"class_type": "CLIPTextEncode", "inputs": {"text": t}});
        let sampler = |p: &str| json!({"class_type": "KSamplerAdvanced", "inputs": {"positive": [p, 0], "negative": [p, 0]}});
        let graph = json!({
            "1": text("unused"), "2": text("used"), "3": sampler("1"), "4": sampler("2"),
            "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0]}},
            "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0]}},
        });
        assert_eq!(comfy(graph).unwrap().0, "used");
    }

    #[test]
    fn a_node_that_passes_both_prompts_on_keeps_them_apart() {
        let text = |t: &str| json!({"class_type": "CLIPTextEncode", "inputs": {"text": t}});
        let graph = json!({
            "1": text("yes"), "2": text("no"),
            "3": {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["1", 0], "negative": ["2", 0]}},
            "4": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "negative": ["3", 1]}},
        });
        assert_eq!(comfy(graph.clone()), Some(("yes".into(), "no".into())));
    }

    #[test]
    fn large_graphs_take_time_and_text_by_their_size() {
        let start = std::time::Instant::now();
        let node = |i: usize| {
            let links: Map<String, Value> = (1..4)
                .map(|k| (k.to_string(), json!([(3 * i + k).to_string(), 0])))
                .collect();
            (
                i.to_string(),
                json!({"class_type": "SaveX", "inputs": links}),
            )
        };
        let wide: Map<String, Value> = (0..40_000).map(node).collect();
        assert_eq!(comfy(Value::Object(wide)), None);
        // Every node joins the one before to itself, with a long text between.
        let doubled = |i: usize| {
            let before = json!([(i + 1).to_string(), 0]);
            let inputs =
                json!({"string_a": before, "string_b": before, "delimiter": "x".repeat(1000)});
            (
                i.to_string(),
                json!({"class_type": "Join", "inputs": inputs}),
            )
        };
        let mut deep: Map<String, Value> = (0..3000).map(doubled).collect();
        deep.insert(
            "s".into(),
            json!({"class_type": "KSampler", "inputs": {"positive": ["0", 0]}}),
        );
        let text = json!({"class_type": "Text", "inputs": {"text": "a".repeat(10_000)}});
        deep.insert("11".into(), text);
        let (prompt, _) = comfy(Value::Object(deep)).unwrap_or_default();
        assert!(prompt.len() <= 2 * MOST_TEXT, "{} bytes", prompt.len());
        assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    }

    #[test]
    fn junk_loops_and_endless_diamonds_end() {
        assert_eq!(from_graph("not json"), None);
        assert_eq!(from_graph("[1, 2]"), None);
        assert_eq!(
            from_graph(r#"{"1": 5, "2": {"inputs": {"positive": "x"}}}"#),
            None
        );
        let sampler = json!({"class_type": "KSampler", "inputs": {"positive": ["0", 0]}});
        let mut graph = Map::from_iter([("s".to_owned(), sampler)]);
        for i in 0..64 {
            let next = if i == 63 {
                "0".to_owned()
            } else {
                (i + 1).to_string()
            };
            let inputs = json!({"conditioning_1": [next, 0], "conditioning_2": [next, 0]});
            graph.insert(
                i.to_string(),
                json!({"class_type": "ConditioningCombine", "inputs": inputs}),
            );
        }
        assert_eq!(comfy(Value::Object(graph)), None);
        let nan = r#"{"1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}, "is_changed": [NaN]},
                      "2": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "denoise": Infinity}}}"#;
        assert_eq!(from_graph(nan).unwrap().prompt, "a cat");
    }
}
