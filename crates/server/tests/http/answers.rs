//! Answers to requests that are in order.

use serde_json::{Value, json};

use crate::client::{model_at, serve, serve_with, thinking_checkpoint};

fn chat(extra: Value) -> Value {
    let mut body = json!({
        "model": "qwen2", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 0, "max_tokens": 24, "ignore_eos": true,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = serve();
    let whole = server.post("/v1/chat/completions", &chat(json!({"logprobs": true, "top_logprobs": 2}))).ok();
    let content = whole["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 24);
    assert_eq!(whole["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 24);
    let streamed = json!({
        "stream": true, "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2
    });
    let events = server.post("/v1/chat/completions", &chat(streamed)).events();
    let choices: Vec<&Value> = events.iter().filter_map(|e| e["choices"].get(0)).collect();
    assert_eq!(choices[0]["delta"]["role"], "assistant");
    let text: String = choices.iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
    assert_eq!(text, content);
    let logprobs: Vec<&Value> = choices.iter().filter_map(|c| c["logprobs"]["content"].as_array()).flatten().collect();
    assert!(logprobs.iter().copied().eq(whole["choices"][0]["logprobs"]["content"].as_array().unwrap()));
    assert_eq!(choices.last().unwrap()["finish_reason"], "length");
    let usage = &events.last().unwrap()["usage"];
    assert_eq!(usage["total_tokens"], whole["usage"]["total_tokens"]);
    assert!(usage["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0), "the prompt was there already");
}

#[test]
fn several_answers_have_seeds_of_their_own() {
    let server = serve();
    let body = chat(json!({"n": 3, "seed": 7, "temperature": 1.5}));
    let texts = |body: &Value| -> Vec<String> {
        let reply = server.post("/v1/chat/completions", body).ok();
        assert_eq!(reply["usage"]["completion_tokens"], 72);
        let choices = reply["choices"].as_array().unwrap().clone();
        choices.iter().map(|c| c["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let first = texts(&body);
    assert!(first[0] != first[1] && first[1] != first[2]);
    assert_eq!(texts(&body), first, "the seed decides");
    let one = server.post("/v1/chat/completions", &chat(json!({"seed": 8, "temperature": 1.5}))).ok();
    assert_eq!(one["choices"][0]["message"]["content"], first[1].as_str());
}

#[test]
fn a_prompt_scored_is_the_answer_scored() {
    let server = serve();
    let ask = |body: Value| server.post("/v1/completions", &body).ok()["choices"][0].clone();
    let ids: Vec<u32> = (0..90).map(|i| 3 + i * 7 % 250).collect();
    let answer = ask(json!({"prompt": ids, "max_tokens": 80, "temperature": 0, "ignore_eos": true, "logprobs": 3}));
    // What was generated, as part of the prompt.
    let text = json!({"tokens": ids});
    let prompt = server.post("/detokenize", &text).ok()["prompt"].as_str().unwrap().to_owned();
    let all = format!("{prompt}{}", answer["text"].as_str().unwrap());
    let scored = ask(json!({"prompt": all, "max_tokens": 0, "echo": true, "logprobs": 3}));
    assert_eq!(scored["text"], all.as_str());
    let list = |choice: &Value, key: &str| choice["logprobs"][key].as_array().unwrap().clone();
    let tokens = list(&scored, "tokens");
    assert_eq!(tokens.len(), list(&scored, "token_logprobs").len());
    assert_eq!(list(&scored, "token_logprobs")[0], Value::Null);
    // Where the tokenizer cuts the text as the model did, the numbers are the same to the last digit.
    let same_ids = server.post("/tokenize", &json!({"prompt": prompt})).ok()["tokens"] == json!(ids);
    if same_ids && tokens.ends_with(&list(&answer, "tokens")) {
        assert!(list(&scored, "token_logprobs").ends_with(&list(&answer, "token_logprobs")));
    }
    // By ids, whatever the text.
    let by_ids =
        ask(json!({"prompt": ids, "max_tokens": 2, "temperature": 0, "echo": true, "logprobs": 1, "ignore_eos": true}));
    let (echoed, alone) = (list(&by_ids, "token_logprobs"), list(&answer, "token_logprobs"));
    assert_eq!(echoed.len(), 92);
    assert_eq!(echoed[90..], alone[..2]);
    assert!(echoed[1..].iter().all(|n| n.as_f64().is_some_and(|n| n <= 0.0)));
}

#[test]
fn many_prompts_in_one_request() {
    let server = serve();
    let ask = |prompt: Value| {
        server
            .post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 5, "temperature": 0, "stop": ["\u{1}"]}))
            .ok()
    };
    let all = ask(json!(["One", "Two", "Three"]));
    for (i, prompt) in ["One", "Two", "Three"].into_iter().enumerate() {
        let one = ask(json!(prompt));
        assert_eq!(all["choices"][i]["text"], one["choices"][0]["text"]);
        assert_eq!(all["choices"][i]["index"], i);
    }
    let body = json!({"prompt": ["One", "Two"], "max_tokens": 5, "temperature": 0, "stream": true});
    let events = server.post("/v1/completions", &body).events();
    let text: String = events
        .iter()
        .filter(|e| e["choices"][0]["index"] == 1)
        .map(|e| e["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, all["choices"][1]["text"].as_str().unwrap());
}

#[test]
fn thinking_is_switched_in_every_spelling() {
    let folder = thinking_checkpoint();
    let server = serve_with(vec![model_at(folder.path(), "qwen3", 2048, 64)], &[]);
    assert_eq!(server.get("/v1/models").ok()["data"][0]["capabilities"]["thinking_switch"], true);
    let prompt = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post("/apply-template", &body).ok()["prompt"].as_str().unwrap().to_owned()
    };
    let off = prompt(json!({"enable_thinking": false}));
    assert!(off.contains("</think>"), "{off}");
    assert!(!prompt(json!({"enable_thinking": true})).contains("</think>"));
    for extra in [
        json!({"think": false}),
        json!({"reasoning_effort": "none"}),
        json!({"reasoning": {"effort": "none"}}),
        json!({"thinking": {"type": "disabled"}}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
    ] {
        assert_eq!(prompt(extra.clone()), off, "{extra}");
    }
}

#[test]
fn text_and_tokens_and_templates() {
    let server = serve();
    let tokens = server.post("/tokenize", &json!({"prompt": "नमस्ते, world"})).ok();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    let text = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).ok();
    assert_eq!(text["prompt"], "नमस्ते, world");
    let messages = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]});
    let prompt = server.post("/apply-template", &messages).ok();
    assert!(prompt["prompt"].as_str().unwrap().ends_with("<|im_start|>assistant\n"));
    let tokens = server.post("/tokenize", &messages).ok();
    assert_eq!(server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).ok()["prompt"], prompt["prompt"]);
}
