//! ComfyUI's `prompt`, the graph of nodes that made a picture: finds the texts behind its sampler.
//!
//! Every node is read at most once a side, loops and long chains end, and the texts of all nodes together are bounded:
//! the work grows with the graph's size and no faster, whoever made it.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::metadata::FoundPrompt;
use crate::metadata::a1111::found;

/// How many nodes lie between a sampler and a text at most: graphs that people draw have less than fifty.
const MAX_DEPTH: usize = 200;
/// Bytes of text that may be put together on the way. A prompt's first 77 tokens count, a few hundred bytes.
const MAX_TEXT: usize = 1 << 20;

/// Reads ComfyUI's `prompt`, a graph of nodes: the texts that the sampler behind the saved picture was given.
pub fn from_graph(json: &str) -> Option<FoundPrompt> {
    // Python writes NaN, which is no JSON.
    let graph: Value = serde_json::from_str(json)
        .or_else(|_| serde_json::from_str(&json.replace("NaN", "null").replace("Infinity", "null")))
        .ok()?;
    Graph::new(graph.as_object()?).prompts()
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Side {
    Positive,
    Negative,
}

/// What is asked of a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Question {
    /// The text behind its conditioning; of nodes that pass on both, the one at this slot.
    Conditioning { slot: u64 },
    /// Its own text.
    Text,
}

/// ComfyUI's nodes by id. A node's input is a value or a link `[id, output slot]`.
struct Graph<'a> {
    nodes: &'a Map<String, Value>,
    /// Answers given; `None` while one is sought, which ends loops.
    answers: HashMap<(&'a str, Question, Side), Option<Rc<str>>>,
    /// Bytes of text that may still be put together.
    text_left: usize,
    /// Inputs looked at, for the test of the work's bound.
    steps: Cell<usize>,
}

/// A link's target and output slot.
type Link<'a> = (&'a str, u64);

impl<'a> Graph<'a> {
    fn new(nodes: &'a Map<String, Value>) -> Self {
        Self {
            nodes,
            answers: HashMap::new(),
            text_left: MAX_TEXT,
            steps: Cell::new(0),
        }
    }

    fn prompts(&mut self) -> Option<FoundPrompt> {
        let sampler = self.sampler()?;
        let positive = self.input(sampler, &["positive", "conditioning"])?;
        let negative = self.input(sampler, &["negative"]);
        let prompt = self.conditioning(positive, Side::Positive, 0);
        let negative = negative.map(|link| self.conditioning(link, Side::Negative, 0));
        found(&prompt, &negative.unwrap_or_default(), "a ComfyUI graph")
    }

    fn inputs(&self, id: &str) -> Option<&'a Map<String, Value>> {
        self.nodes.get(id)?.get("inputs")?.as_object()
    }

    /// Counts the inputs of a node that are about to be looked at.
    fn count(&self, inputs: &Map<String, Value>) {
        self.steps.set(self.steps.get() + 1 + inputs.len());
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
    fn sampler(&self) -> Option<&'a str> {
        let nodes = self.nodes;
        let ids = || nodes.keys().map(String::as_str);
        let saves = |id: &&str| {
            let class = self.class(id);
            class.contains("Save") || class.contains("Preview")
        };
        let mut queue: Vec<&str> = ids().filter(saves).collect();
        let mut queued: HashSet<&str> = queue.iter().copied().collect();
        let mut seen = 0;
        while let Some(&id) = queue.get(seen) {
            seen += 1;
            if self.takes_prompts(id) {
                return Some(id);
            }
            let Some(inputs) = self.inputs(id) else {
                continue;
            };
            self.count(inputs);
            let links = inputs.values().filter_map(link);
            queue.extend(
                links
                    .map(|(next, _)| next)
                    .filter(|next| queued.insert(next)),
            );
        }
        ids()
            .filter(|id| self.class(id).contains("Sampler"))
            .find(|id| self.takes_prompts(id))
    }

    /// The text behind a conditioning, through whatever nodes pass it on.
    fn conditioning(&mut self, (id, slot): Link<'a>, side: Side, depth: usize) -> Rc<str> {
        // Of a node's outputs only the second is told from the others.
        let slot = slot.min(2);
        self.answer(id, Question::Conditioning { slot }, side, depth)
    }

    /// A node's answer, from the first time it is asked for.
    fn answer(&mut self, id: &'a str, question: Question, side: Side, depth: usize) -> Rc<str> {
        let key = (id, question, side);
        if let Some(known) = self.answers.get(&key) {
            return known.clone().unwrap_or_default();
        }
        let inputs = self.inputs(id).filter(|_| depth < MAX_DEPTH);
        let Some(inputs) = inputs else {
            return Rc::default();
        };
        self.count(inputs);
        self.answers.insert(key, None);
        let text = match question {
            Question::Text => self.text_of(inputs, side, depth),
            Question::Conditioning { slot } => self.passed_on(id, slot, inputs, side, depth),
        };
        self.answers.insert(key, Some(text.clone()));
        text
    }

    fn passed_on(
        &mut self,
        id: &str,
        slot: u64,
        inputs: &'a Map<String, Value>,
        side: Side,
        depth: usize,
    ) -> Rc<str> {
        if self.class(id) == "ConditioningZeroOut" {
            return Rc::default();
        }
        // Nodes that pass on both (ControlNetApplyAdvanced) give the positive at slot 0, the negative at slot 1.
        let both = link(inputs.get("positive").unwrap_or(&Value::Null))
            .zip(link(inputs.get("negative").unwrap_or(&Value::Null)));
        if let Some((positive, negative)) = both {
            let passed = if slot == 1 { negative } else { positive };
            return self.conditioning(passed, side, depth + 1);
        }
        if self.class(id).contains("TextEncode") || !has_conditioning(inputs) {
            return self.text_of(inputs, side, depth);
        }
        let links = inputs
            .iter()
            .filter(|(k, _)| is_conditioning(k))
            .filter_map(|(_, v)| link(v));
        let texts: Vec<Rc<str>> = links
            .map(|link| self.conditioning(link, side, depth + 1))
            .collect();
        self.join(&texts, ", ")
    }

    /// The text among a node's inputs, given outright or by links to string nodes.
    fn text_of(&mut self, inputs: &'a Map<String, Value>, side: Side, depth: usize) -> Rc<str> {
        // Loaders that encode too name both texts; SDXL's encoder has two texts, mostly equal.
        let named: &[&str] = match side {
            Side::Positive => &["positive", "positive_prompt", "text_positive"],
            Side::Negative => &["negative", "negative_prompt", "text_negative"],
        };
        let keys = named.iter().chain(&[
            "text", "text_g", "text_l", "prompt", "string", "value", "clip_l", "t5xxl",
        ]);
        for key in keys {
            let value = inputs.get(*key);
            let text = value.map(|value| self.string(value, side, depth));
            if let Some(text) = text.filter(|text| !text.is_empty()) {
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
        let parts: Vec<Rc<str>> = parts
            .map(|(_, value)| self.string(value, side, depth))
            .collect();
        self.join(&parts, delimiter)
    }

    fn string(&mut self, value: &'a Value, side: Side, depth: usize) -> Rc<str> {
        match (value, link(value)) {
            (Value::String(text), _) => self.join(&[Rc::from(&**text)], ""),
            (_, Some((id, _))) => self.answer(id, Question::Text, side, depth + 1),
            _ => Rc::default(),
        }
    }

    /// The texts that are not blank, one after the other, as far as they may go.
    fn join(&mut self, texts: &[Rc<str>], between: &str) -> Rc<str> {
        let mut joined = String::new();
        for text in texts.iter().filter(|t| !t.trim().is_empty()) {
            let between = if joined.is_empty() { "" } else { between };
            let length = between.len() + text.len();
            let Some(left) = self.text_left.checked_sub(length) else {
                break;
            };
            self.text_left = left;
            joined.push_str(between);
            joined.push_str(text);
        }
        joined.into()
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

    const NODES: usize = 40_000;

    /// A node for each number, with a sampler before them.
    fn large(node: impl Fn(usize) -> Value) -> Map<String, Value> {
        let sampler = json!({"class_type": "KSampler", "inputs": {"positive": ["0", 0], "negative": ["1", 0]}});
        let saved = json!({"class_type": "SaveImage", "inputs": {"images": ["s", 0]}});
        let mut graph = Map::from_iter([("s".to_owned(), sampler), ("save".to_owned(), saved)]);
        graph.extend((0..NODES).map(|i| (i.to_string(), node(i))));
        graph
    }

    #[test]
    fn the_work_grows_with_the_graph_and_no_faster() {
        let class = |class: &str, inputs: Value| json!({"class_type": class, "inputs": inputs});
        let next = |i: usize, by: usize| ((i + by) % NODES).to_string();
        let many: Vec<(String, Value)> = (0..NODES)
            .map(|i| (format!("text_{i}"), json!([i.to_string(), 0])))
            .collect();
        let wide = Value::Object(Map::from_iter(many));
        for (what, graph) in [
            (
                "a chain",
                large(|i| class("Reroute", json!({"conditioning": [next(i, 1), 0]}))),
            ),
            (
                "a chain of texts",
                large(|i| class("Join", json!({"text_a": [next(i, 1), 0], "text_b": "x"}))),
            ),
            (
                "diamonds",
                large(|i| {
                    class(
                        "ConditioningCombine",
                        json!({"conditioning_1": [next(i, 1), 0], "conditioning_2": [next(i, 2), 0]}),
                    )
                }),
            ),
            (
                "texts that double",
                large(|i| {
                    class(
                        "Join",
                        json!({"text_a": [next(i, 1), 0], "text_b": [next(i, 1), 0]}),
                    )
                }),
            ),
            (
                "both passed on",
                large(|i| {
                    class(
                        "ControlNetApplyAdvanced",
                        json!({"positive": [next(i, 1), 0], "negative": [next(i, 1), 1]}),
                    )
                }),
            ),
            (
                "pictures that all save",
                large(|i| class("SaveImage", json!({"images": [next(i, 1), 0]}))),
            ),
            (
                "texts alone",
                large(|_| class("CLIPTextEncode", json!({"text": "a cat"}))),
            ),
            (
                "one node that joins all",
                large(|i| {
                    class(
                        "Join",
                        if i == 0 {
                            wide.clone()
                        } else {
                            json!({"text": "x".repeat(99)})
                        },
                    )
                }),
            ),
            ("no way to the sampler", {
                let mut graph = large(|i| class("VAEDecode", json!({"samples": [next(i, 1), 0]})));
                graph.remove("s");
                graph
            }),
        ] {
            let inputs = |node: &Value| node["inputs"].as_object().map_or(0, Map::len);
            let size: usize = graph.values().map(|node| 1 + inputs(node)).sum();
            let mut read = Graph::new(&graph);
            let text = read.prompts();
            // Once on the way to the sampler; then each side, as conditioning from two slots and as text.
            let steps = read.steps.get();
            assert!(
                steps <= 7 * size,
                "{what}: {steps} steps for a graph of {size}"
            );
            let length = text.map_or(0, |text| text.prompt.len() + text.negative.len());
            assert!(length <= MAX_TEXT, "{what}: {length} bytes of text");
        }
    }

    #[test]
    fn a_text_that_two_nodes_share_is_given_to_both() {
        let encode =
            |from: &str| json!({"class_type": "CLIPTextEncode", "inputs": {"text": [from, 0]}});
        let graph = json!({
            "t": {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}},
            "1": encode("t"), "2": encode("t"),
            "3": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["1", 0], "conditioning_2": ["2", 0]}},
            "4": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "negative": ["1", 0]}},
        });
        assert_eq!(comfy(graph), Some(("a cat, a cat".into(), "a cat".into())));
    }
}
