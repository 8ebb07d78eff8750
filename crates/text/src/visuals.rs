//! Images and films in a conversation: parts of messages on their way through a chat template that may not know parts.
//!
//! A part is `{"type": "image"}` or `{"type": "video"}`; what it shows is not known here. Templates of vision models write a
//! placeholder for each. Where a template takes content as text alone, the same placeholders are put into the text. A film
//! of a model that is told the time of each step (`"times"`, in seconds) becomes a time and a placeholder for each step, as
//! Hugging Face's processor of Qwen3-VL writes them.
//!
//! Contract: called between marking and rendering ([`crate::guard`]), so that placeholders stand only where a part is.

use serde_json::{Map, Value, json};

use crate::{ChatInput, ChatTemplate, Error};

const START: &str = "<|vision_start|>";
const END: &str = "<|vision_end|>";
const IMAGE_PAD: &str = "<|image_pad|>";
const VIDEO_PAD: &str = "<|video_pad|>";

/// The films of a conversation, of each the times of its steps; none where the model is not told them.
#[derive(Debug, Default)]
pub(crate) struct Films(Vec<Vec<f64>>);

/// Takes note of the visuals in `messages`, and writes them into the text where the template would not.
pub(crate) fn prepare(template: &ChatTemplate, variables: &mut Map<String, Value>) -> Result<Films, Error> {
    let Some(Value::Array(messages)) = variables.get_mut("messages") else { return Ok(Films::default()) };
    let contents = messages.iter_mut().filter_map(|message| message.get_mut("content"));
    let mut shown: Vec<&mut Value> = contents.filter(|content| parts(content).any(is_visual)).collect();
    if shown.is_empty() {
        return Ok(Films::default());
    }
    let films = shown.iter().flat_map(|content| parts(content)).filter(|part| part["type"] == "video").map(times);
    let films = Films(films.collect());
    if !writes_parts(template)? {
        for content in &mut shown {
            let text = parts(content).map(as_text).collect();
            **content = Value::String(text);
        }
    }
    Ok(films)
}

impl Films {
    /// The prompt with the steps of each film in place of its one placeholder.
    pub(crate) fn spread(&self, prompt: String) -> String {
        if self.0.iter().all(Vec::is_empty) {
            return prompt;
        }
        let (mut spread, mut rest) = (String::with_capacity(prompt.len()), prompt.as_str());
        for times in &self.0 {
            let Some((before, behind)) = rest.split_once(VIDEO_PAD) else { break };
            rest = behind;
            if times.is_empty() {
                spread.extend([before, VIDEO_PAD]);
                continue;
            }
            // Each step has marks of its own.
            let own_marks = before.strip_suffix(START).zip(behind.strip_prefix(END));
            let (before, behind) = own_marks.unwrap_or((before, behind));
            spread.push_str(before);
            for time in times {
                spread.push_str(&format!("<{time:.1} seconds>{START}{VIDEO_PAD}{END}"));
            }
            rest = behind;
        }
        spread + rest
    }
}

/// Whether a template writes a placeholder for a part and its neighbour's text as it is.
fn writes_parts(template: &ChatTemplate) -> Result<bool, Error> {
    const TEXT: &str = "What is this";
    let content = json!([{ "type": "image" }, { "type": "text", "text": TEXT }]);
    let messages = json!([{ "role": "user", "content": content }]);
    match template.render(&ChatInput { messages, ..ChatInput::default() }) {
        Ok(prompt) => Ok(prompt.contains(IMAGE_PAD) && prompt.contains(TEXT) && !prompt.contains("'type'")),
        // A template may choke on a list where it wants text; running too long it would with text as well.
        Err(Error::TemplateRun { .. } | Error::TemplateRaised { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn parts(content: &Value) -> impl Iterator<Item = &Value> {
    content.as_array().into_iter().flatten()
}

fn is_visual(part: &Value) -> bool {
    part["type"] == "image" || part["type"] == "video"
}

fn times(film: &Value) -> Vec<f64> {
    film["times"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}

/// What a part is in text.
fn as_text(part: &Value) -> String {
    match part["type"].as_str() {
        Some("image") => format!("{START}{IMAGE_PAD}{END}"),
        Some("video") => format!("{START}{VIDEO_PAD}{END}"),
        _ => part["text"].as_str().unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
    const KNOWING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}\
        {% else %}{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
        {% elif p.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}\
        {% endfor %}{% endif %}<|im_end|>\n{% endfor %}";

    fn rendered(template: &str, content: Value) -> String {
        let template = ChatTemplate::new(template, "test").expect("a template");
        let messages = json!([{ "role": "system", "content": "Look." }, { "role": "user", "content": content }]);
        let mut variables = Map::new();
        variables.insert("messages".to_owned(), messages);
        let films = prepare(&template, &mut variables).expect("a conversation");
        let messages = variables.remove("messages").expect("still there");
        films.spread(template.render(&ChatInput { messages, ..ChatInput::default() }).expect("a prompt"))
    }

    #[test]
    fn templates_with_and_without_parts_give_one_prompt() {
        let content = json!([
            { "type": "text", "text": "Is " }, { "type": "image" }, { "type": "text", "text": " in " },
            { "type": "video" }, { "type": "text", "text": "?" },
        ]);
        let expected = "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\nIs <|vision_start|><|image_pad|>\
            <|vision_end|> in <|vision_start|><|video_pad|><|vision_end|>?<|im_end|>\n";
        assert_eq!(rendered(PLAIN, content.clone()), expected);
        assert_eq!(rendered(KNOWING, content), expected);
    }

    #[test]
    fn steps_of_films_are_told_their_times() {
        let content = json!([
            { "type": "video", "times": [0.25, 1.25] }, { "type": "image" }, { "type": "video" },
            { "type": "video", "times": [0.0] },
        ]);
        let step = |time: &str| format!("<{time} seconds><|vision_start|><|video_pad|><|vision_end|>");
        let untold = "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>";
        let expected = format!("user\n{}{}{untold}{}<|im_end|>\n", step("0.2"), step("1.2"), step("0.0"));
        for template in [PLAIN, KNOWING] {
            assert!(rendered(template, content.clone()).ends_with(&expected), "{template}");
        }
    }

    #[test]
    fn lists_of_text_stay_what_they_are() {
        let content = json!([{ "type": "text", "text": "a" }]);
        assert!(rendered(KNOWING, content.clone()).ends_with("user\na<|im_end|>\n"));
        assert!(rendered(PLAIN, content).contains("'type'"));
    }
}
