//! `embed` and `rerank`: vectors and scores for lines of texts, whatever the lines hold.

use std::fs;
use std::path::Path;

use qwenkit_formats::Gguf;
use qwenkit_formats::gguf::{Array, TensorSpec, Value as Meta, Writer};
use serde_json::{Value, json};

use crate::program::{Place, fixture};
use crate::recorded;

fn vector(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn lines_keep_what_they_say_of_themselves_and_get_their_vectors() {
    let place = Place::new();
    let input = b"{\"id\": 7, \"text\": \"one\"}\nnonsense\n{\"text\": 5}\n{\"text\": \"\"}\n{\"text\": \"two\", \"instruction\": \"find\"}\n";
    for model in ["parity/qwen2", "parity/qwen3.5"] {
        let model = fixture(model);
        let outcome = place.run_with(&["embed", "--model", &model, "--jsonl"], input).exits(1);
        let answers = outcome.json_lines();
        assert_eq!(answers.len(), 5, "{outcome:?}");
        assert_eq!((&answers[0]["id"], answers[0].get("text")), (&json!(7), None));
        let first = vector(&answers[0]["embedding"]);
        assert!((first.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
        for (i, word) in [(1, "line 2"), (2, "line 3"), (3, "no tokens")] {
            assert!(answers[i]["error"].as_str().is_some_and(|error| error.contains(word)), "{}", answers[i]);
        }
        assert!(answers[4]["tokens"].as_u64() > answers[0]["tokens"].as_u64());
        // Alone, and as an argument, the vector is the same.
        let alone = place.run(&["embed", "--model", &model, "one"]).exits(0);
        assert_eq!(vector(&serde_json::from_str(alone.out.trim()).unwrap()), first);
        let short = place.run(&["embed", "--model", &model, "--dimensions", "32", "one"]).exits(0);
        assert_eq!(vector(&serde_json::from_str(short.out.trim()).unwrap()).len(), 32);
    }
    place.run(&["embed", "--model", &fixture("parity/qwen2"), "--dimensions", "99999", "x"]).fails_with(2, &["99999"]);
    place.run(&["embed", "--model", &fixture("parity/qwen2")]).fails_with(2, &["TEXTS"]);
}

#[test]
fn a_model_without_the_words_to_judge_by_refuses_at_once() {
    let place = Place::new();
    let model = fixture("parity/qwen2");
    place.run(&["rerank", "--model", &model, "--query", "q", "d"]).fails_with(1, &["no token", "Qwen3-Reranker"]);
}

#[test]
fn an_embedding_model_without_its_end_token_refuses_at_once() {
    let place = Place::new();
    let model = fixture("parity/qwen2/model.gguf");
    place.run(&["embed", "--model", &model, "one"]).fails_with(1, &["no token", "<|endoftext|>", "Qwen3-Embedding"]);
}

/// As Qwen3-Embedding is published: the body of a model, saved by itself.
#[test]
fn a_body_alone_embeds_and_answers_nothing() {
    let place = Place::new();
    let folder = place.path("embedding");
    fs::create_dir_all(&folder).expect("a folder");
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(format!("{}/{name}", fixture("parity/qwen3")), folder.join(name)).expect("copied");
    }
    let whole = recorded::read(format!("{}/model.safetensors", fixture("parity/qwen3")).as_ref());
    let body = whole.into_iter().filter(|(name, _)| name != "lm_head.weight");
    let body = body.map(|(name, tensor)| (name.trim_start_matches("model.").to_owned(), tensor)).collect();
    recorded::write(&folder.join("model.safetensors"), &body);
    let model = folder.to_str().expect("a path");
    let of = |model: &str| place.run(&["embed", "--model", model, "one"]).exits(0).out;
    assert_eq!(of(model), of(&fixture("parity/qwen3")));
    let refusal = ["no output head", "embedding", model];
    place.run(&["run", model, "Hello"]).fails_with(1, &refusal);
    place.run(&["bench", "--model", model, "--prompt", "8", "--generate", "2"]).fails_with(1, &refusal);
    place.run(&["rerank", "--model", model, "--query", "q", "d"]).fails_with(1, &refusal);
    let out = place.path("logits.safetensors");
    let args = ["logits", "--model", model, "--ids", "1,2", "--out", out.to_str().expect("a path")];
    place.run(&args).fails_with(1, &refusal[..2]);
}

/// The qwen2 fixture as converters write rerankers: two rows of its head are those of yes and no.
fn write_reranker(to: &Path) {
    let gguf = Gguf::open(fixture("parity/qwen2/model.gguf").as_ref()).expect("a fixture");
    let mut metadata = gguf.metadata().clone();
    metadata.set("qwen2.pooling_type", Meta::U32(4));
    metadata.set("qwen2.classifier.output_labels", Meta::Array(Array::String(["yes", "no"].into_iter().collect())));
    let tensors: Vec<(TensorSpec, Vec<u8>)> = gguf
        .tensors()
        .iter()
        .map(|info| {
            let mut bytes = vec![0; info.len_bytes];
            gguf.read(info, 0, &mut bytes).expect("readable");
            let mut spec = TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() };
            if info.name == "output.weight" {
                let row = info.len_bytes / spec.shape[0];
                bytes = [&bytes[70 * row..71 * row], &bytes[85 * row..86 * row]].concat();
                (spec.name, spec.shape[0]) = ("cls.output.weight".to_owned(), 2);
            }
            (spec, bytes)
        })
        .collect();
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = Writer::create(to, &metadata, &specs).expect("writable");
    for (spec, bytes) in &tensors {
        writer.write(&spec.name, bytes).expect("written");
    }
    writer.finish().expect("finished");
}

#[test]
fn lines_are_judged_together_as_alone_and_a_long_document_is_cut_at_its_end() {
    let place = Place::new();
    write_reranker(&place.path("reranker.gguf"));
    let rerank = |input: &str, code: i32| {
        let args = ["rerank", "--model", "reranker.gguf", "--ctx", "1024", "--jsonl"];
        place.run_with(&args, input.as_bytes()).exits(code).json_lines()
    };
    let long = "a very long document ".repeat(200);
    let lines = [
        json!({"id": 1, "query": "a", "documents": ["one", "two", "three"], "top_n": 2}),
        json!({"query": "b", "document": "four"}),
        json!({"query": "b"}),
        json!({"query": "c", "documents": ["five", long]}),
        json!({"query": "c", "document": long}),
        json!({"query": long, "document": "six"}),
    ];
    let all = rerank(&lines.iter().map(|line| format!("{line}\n")).collect::<String>(), 1);
    assert_eq!(all.len(), lines.len());
    for (i, (line, found)) in lines.iter().zip(&all).enumerate() {
        let alone = &rerank(&line.to_string(), i32::from(matches!(i, 2 | 5)))[0];
        match found["error"].as_str() {
            // Alone it is line 1.
            Some(error) => {
                assert!(error.contains(&format!("line {}: ", i + 1)) && alone["error"].is_string(), "{found}")
            }
            None => assert_eq!(found, alone, "line {}", i + 1),
        }
    }
    assert_eq!((&all[0]["id"], all[0]["results"].as_array().map(Vec::len)), (&json!(1), Some(2)));
    assert!(all[2]["error"].as_str().is_some_and(|error| error.contains("`documents`")), "{}", all[2]);
    // What is left out is told; the judgement is asked for behind what is left.
    let results = all[3]["results"].as_array().expect("results");
    let of = |index: u64| results.iter().find(|result| result["index"] == index).expect("a result");
    assert_eq!(of(0).get("document_tokens_left_out"), None);
    let left_out = of(1)["document_tokens_left_out"].as_u64().expect("a number");
    assert!(left_out > 1000, "{left_out}");
    assert_eq!((&all[4]["document_tokens_left_out"], &all[4]["score"]), (&json!(left_out), &of(1)["relevance_score"]));
    // Two documents that differ behind the end are one to the model.
    let other = json!({"query": "c", "document": format!("{long} and more")});
    assert_eq!(rerank(&other.to_string(), 0)[0]["score"], all[4]["score"]);
    // A query has to be whole.
    assert!(all[5]["error"].as_str().is_some_and(|error| error.contains("1024")), "{}", all[5]);
    let args = ["rerank", "--model", "reranker.gguf", "--ctx", "1024", "--query", "c", "five", &long];
    let told = place.run(&args).exits(0);
    assert!(told.err.contains(&format!("of document 2 the last {left_out} tokens were not read")), "{told:?}");
}

#[test]
fn a_reranker_without_its_head_is_refused_at_once() {
    let place = Place::new();
    let gguf = Gguf::open(fixture("parity/qwen2/model.gguf").as_ref()).expect("a fixture");
    let mut metadata = gguf.metadata().clone();
    metadata.set("qwen2.pooling_type", Meta::U32(4));
    let kept: Vec<_> = gguf.tensors().iter().filter(|info| info.name != "output.weight").collect();
    let spec = |info: &&qwenkit_formats::TensorInfo| TensorSpec {
        name: info.name.clone(),
        dtype: info.dtype,
        shape: info.shape.clone(),
    };
    let mut writer =
        Writer::create(&place.path("r.gguf"), &metadata, &kept.iter().map(spec).collect::<Vec<_>>()).expect("writable");
    for info in kept {
        let mut bytes = vec![0; info.len_bytes];
        gguf.read(info, 0, &mut bytes).expect("readable");
        writer.write(&info.name, &bytes).expect("written");
    }
    writer.finish().expect("finished");
    let parts =
        ["`qwen2.pooling_type` is 4", "neither `cls.output.weight` nor `output.weight`", "expected one of these"];
    place.run(&["rerank", "--model", "r.gguf", "--query", "q", "d"]).fails_with(1, &parts);
}
