//! Images in every interface: one question, four spellings, one prompt; and whatever is wrong with an image.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use qwenkit_server::{Config, ImageLimits, Limits};
use serde_json::{Value, json};

use crate::client::{Running, image_file, model, seeing, serve_config, serve_with};

const MODEL: &str = "qwen2.5-vl";

fn serve() -> Running {
    serve_with(vec![seeing(MODEL, 2048)], &[])
}

fn base64(name: &str) -> String {
    STANDARD.encode(image_file(name))
}

fn data_url(name: &str) -> String {
    format!("data:image/png;base64,{}", base64(name))
}

/// A question about images, in OpenAI's words.
fn chat(images: &[&str]) -> Value {
    let parts = images.iter().map(|name| json!({"type": "image_url", "image_url": {"url": data_url(name)}}));
    let text = json!({"type": "text", "text": "What is this?"});
    let content: Vec<Value> = parts.chain([text]).collect();
    json!({"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0})
}

fn text_of(answer: &Value) -> Value {
    answer["choices"][0]["message"]["content"].clone()
}

#[test]
fn every_interface_shows_the_same_image() {
    let server = serve();
    let answer = server.post("/v1/chat/completions", &chat(&["tiny.png"])).ok();
    let (text, tokens) = (text_of(&answer), answer["usage"]["prompt_tokens"].clone());
    let plain = server.post("/v1/chat/completions", &chat(&[])).ok();
    // Six tokens of the image and the two around them.
    assert_eq!(tokens.as_u64(), plain["usage"]["prompt_tokens"].as_u64().map(|n| n + 8));

    let input = json!([{"role": "user", "content": [
        {"type": "input_image", "image_url": data_url("tiny.png"), "detail": "auto"},
        {"type": "input_text", "text": "What is this?"},
    ]}]);
    let body = json!({"input": input, "max_output_tokens": 6, "temperature": 0});
    let response = server.post("/v1/responses", &body).ok();
    assert_eq!(response["output"][0]["content"][0]["text"], text);
    assert_eq!(response["usage"]["input_tokens"], tokens);

    let source = json!({"type": "base64", "media_type": "image/png", "data": base64("tiny.png")});
    let content = json!([{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]);
    let messages = json!([{"role": "user", "content": content}]);
    let body = json!({"model": MODEL, "max_tokens": 6, "temperature": 0, "messages": messages});
    let message = server.post("/v1/messages", &body).ok();
    assert_eq!(message["content"][0]["text"], text);
    assert_eq!(
        message["usage"]["input_tokens"]
            .as_u64()
            .map(|n| n + message["usage"]["cache_read_input_tokens"].as_u64().unwrap_or(0)),
        tokens.as_u64()
    );
    let counted = server.post("/v1/messages/count_tokens", &json!({"model": MODEL, "messages": messages})).ok();
    assert_eq!(counted["input_tokens"], tokens);

    let message = json!({"role": "user", "content": "What is this?", "images": [base64("tiny.png")]});
    let options = json!({"temperature": 0, "num_predict": 6});
    let body = json!({"model": MODEL, "messages": [message], "stream": false, "options": options});
    let line = server.post("/api/chat", &body).ok();
    assert_eq!((&line["message"]["content"], &line["prompt_eval_count"]), (&text, &tokens));
    let images = json!([data_url("tiny.png")]);
    let body =
        json!({"model": MODEL, "prompt": "What is this?", "images": images, "stream": false, "options": options});
    assert_eq!(server.post("/api/generate", &body).ok()["response"], text);

    let body = json!({"messages": chat(&["tiny.png"])["messages"]});
    assert_eq!(server.post("/tokenize", &body).ok()["count"], tokens);
    let prompt = server.post("/apply-template", &body).ok()["prompt"].clone();
    assert!(prompt.as_str().unwrap().contains("<|vision_start|><|image_pad|><|vision_end|>What is this?"), "{prompt}");

    let mut streamed = chat(&["tiny.png"]);
    streamed["stream"] = json!(true);
    let events = server.post("/v1/chat/completions", &streamed).events();
    let told: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(json!(told), text);
}

#[test]
fn the_same_words_about_another_image_are_another_prompt() {
    let server = serve();
    let ask = |images: &[&str]| {
        let mut body = chat(images);
        (body["logprobs"], body["top_logprobs"]) = (json!(true), json!(5));
        server.post("/v1/chat/completions", &body).ok()
    };
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    // Two images of one size: 54 tokens and more, so that a page is full behind them.
    let (first, second) = (["photo.png", "exact.png"], ["photo.png", "alpha.png"]);
    let fresh =
        [ask(&first), serve_with(vec![seeing(MODEL, 2048)], &[]).post("/v1/chat/completions", &chat(&second)).ok()];
    let after = ask(&second);
    assert_eq!(text_of(&after), text_of(&fresh[1]), "what the first request left changed the second");
    let again = ask(&first);
    assert_eq!(again["choices"][0]["logprobs"], fresh[0]["choices"][0]["logprobs"]);
    assert_eq!(cached(&again), again["usage"]["prompt_tokens"].as_u64().unwrap() - 1, "the same again is all there");
    assert!(cached(&after) < cached(&again));
}

#[test]
fn a_response_can_be_followed_on_and_keeps_its_images() {
    let server = serve();
    let image = json!({"type": "input_image", "image_url": data_url("tiny.png")});
    let input = json!([{"role": "user", "content": [image, {"type": "input_text", "text": "What is this?"}]}]);
    let first = server.post("/v1/responses", &json!({"input": input, "max_output_tokens": 4, "temperature": 0})).ok();
    let items = server.get(&format!("/v1/responses/{}/input_items", first["id"].as_str().unwrap())).ok();
    assert_eq!(items["data"][0]["content"][0]["image_url"], data_url("tiny.png"));
    let next = json!({"input": "And now?", "previous_response_id": first["id"], "max_output_tokens": 4});
    let second = server.post("/v1/responses", &next).ok();
    let said = first["output"][0]["content"][0]["text"].clone();
    let image = json!({"type": "image_url", "image_url": {"url": data_url("tiny.png")}});
    let whole = json!([
        {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": said}, {"role": "user", "content": "And now?"},
    ]);
    let whole = server.post("/tokenize", &json!({"messages": whole})).ok();
    assert_eq!(second["usage"]["input_tokens"], whole["count"], "the image is still in the prompt");
}

#[test]
fn models_say_whether_they_see() {
    let server = serve_with(vec![seeing(MODEL, 2048), model("qwen2", 2048, 64)], &[]);
    let list = server.get("/v1/models").ok();
    assert_eq!(list["data"][0]["capabilities"]["images"], true);
    assert_eq!(list["data"][1]["capabilities"]["images"], false);
    let info = server.get("/server_info").ok();
    assert_eq!((&info["models"][0]["images"], &info["models"][1]["images"]), (&json!(true), &json!(false)));
    let capabilities = |name: &str| server.post("/api/show", &json!({"model": name})).ok()["capabilities"].to_string();
    assert!(capabilities(MODEL).contains("vision") && !capabilities("qwen2").contains("vision"));
    let mut body = chat(&["tiny.png"]);
    body["model"] = json!("qwen2");
    let error = server.refused("/v1/chat/completions", &body, 400);
    assert_eq!(error["param"], "messages[0].content[0].type");
    assert!(error["message"].as_str().unwrap().contains("qwen2 reads text only"), "{error}");
}

#[test]
fn what_is_wrong_with_an_image_is_said_by_name() {
    let images = ImageLimits { count: 2, file_bytes: 100_000, pixels: 60_000, held_bytes: 1 << 20 };
    let models = vec![seeing(MODEL, 256)];
    let server = serve_config(models, |config| Config { limits: Limits { images, ..config.limits }, ..config });
    let url = "messages[0].content[0].image_url.url";
    let ask = |given: Value| {
        let content = json!([{"type": "image_url", "image_url": given}]);
        json!({"messages": [{"role": "user", "content": content}], "max_tokens": 2})
    };
    let of = |bytes: &[u8]| json!({"url": format!("data:image/png;base64,{}", STANDARD.encode(bytes))});
    let photo = image_file("photo.png");
    let bomb = b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0";
    let cases = [
        (json!({"url": "https://example.com/cat.png"}), url, "https URL, and this server fetches nothing"),
        (json!({"url": "file:///etc/passwd"}), url, "reads no files"),
        (json!({"url": "data:text/html;base64,QUJD"}), url, "text/html"),
        (json!({"url": "data:image/png;base64,@@@@"}), url, "no base64"),
        (json!({"url": "data:image/png;base64,"}), url, "an empty file"),
        (json!({"url": 5}), url, "a string"),
        (json!({}), url, "missing"),
        (json!(5), "messages[0].content[0].image_url", "a data URL"),
        (of(b"hello"), url, "expected PNG, JPEG, WebP or GIF"),
        (of(&photo[..5000]), url, "cut short"),
        (of(bomb), url, "65535 x 65535 pixels"),
        (of(&vec![0; 200_000]), url, "bytes, expected at most 100000"),
        (json!({"url": data_url("tiny.png"), "detail": "huge"}), "messages[0].content[0].image_url.detail", "huge"),
        (json!({"url": data_url("tiny.png"), "zoom": 2}), "messages[0].content[0].image_url.zoom", "no parameter"),
    ];
    for (given, param, told) in cases {
        let error = server.refused("/v1/chat/completions", &ask(given), 400);
        assert_eq!(error["param"], param, "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(told) && message.len() < 500, "{error}");
    }
    for detail in ["low", "high", "auto"] {
        server.post("/v1/chat/completions", &ask(json!({"url": data_url("tiny.png"), "detail": detail}))).ok();
    }
    server.post("/v1/chat/completions", &ask(json!(data_url("tiny.png")))).ok();
    // Too many, too large for the context, and in the mouth of the wrong one.
    let error = server.refused("/v1/chat/completions", &chat(&["tiny.png"; 3]), 400);
    assert_eq!((&error["param"], &error["code"]), (&json!("messages[0].content[2].type"), &json!("too_many_images")));
    let error = server.refused("/v1/chat/completions", &chat(&["wide.png", "wide.png"]), 400);
    assert_eq!(error["code"], "image_too_large", "{error}");
    let narrow = serve_with(vec![seeing(MODEL, 64)], &[]);
    let error = narrow.refused("/v1/chat/completions", &chat(&["wide.png", "wide.png"]), 400);
    assert_eq!(error["code"], "context_length_exceeded", "{error}");
    let content = chat(&["tiny.png"])["messages"][0]["content"].clone();
    for role in ["system", "assistant"] {
        let messages = json!([{"role": role, "content": content}, {"role": "user", "content": "Hi"}]);
        let error = server.refused("/v1/chat/completions", &json!({"messages": messages}), 400);
        assert!(error["message"].as_str().unwrap().contains("users and tools"), "{error}");
    }
    let source = json!({"type": "url", "url": "https://example.com/cat.png"});
    let messages = json!([{"role": "user", "content": [{"type": "image", "source": source}]}]);
    let error = server.refused("/v1/messages", &json!({"model": MODEL, "max_tokens": 2, "messages": messages}), 400);
    assert!(error["message"].as_str().unwrap().contains("fetches nothing"), "{error}");
    let message = json!({"role": "user", "content": "Hi", "images": ["http://example.com/cat.png"]});
    let reply = server.post("/api/chat", &json!({"model": MODEL, "messages": [message]}));
    assert!(reply.status == 400 && reply.text().contains("fetches nothing"), "{}", reply.text());
    let part = json!({"type": "input_image", "file_id": "file-1"});
    let input = json!([{"role": "user", "content": [part]}]);
    assert_eq!(server.refused("/v1/responses", &json!({"input": input}), 400)["param"], "input[0].content[0].file_id");
    // And all the while it serves.
    server.post("/v1/chat/completions", &chat(&["tiny.png"])).ok();
}

#[test]
fn an_images_file_counts_against_the_memory_for_images() {
    let images = ImageLimits { held_bytes: 4 << 16, ..ImageLimits::default() };
    let models = vec![seeing(MODEL, 256)];
    let server = serve_config(models, |config| Config { limits: Limits { images, ..config.limits }, ..config });
    let ask = |text: String| {
        let image = json!({"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{text}")}});
        json!({"messages": [{"role": "user", "content": [image]}], "max_tokens": 2})
    };
    let whole = STANDARD.encode(vec![0; 300_000]);
    let error = server.refused("/v1/chat/completions", &ask(whole), 400);
    assert_eq!(error["code"], "image_too_large", "{error}");
    // Broken into lines, it is copied once more.
    let half = STANDARD.encode(vec![0; 100_000]);
    let error = server.refused("/v1/chat/completions", &ask(half.replacen("AAAA", "AAAA\n", 1)), 400);
    assert_eq!(error["code"], "image_too_large", "{error}");
    // And all is given back.
    assert_eq!(server.refused("/v1/chat/completions", &ask(half), 400)["code"], "invalid_image");
    server.post("/v1/chat/completions", &chat(&["tiny.png"])).ok();
}
