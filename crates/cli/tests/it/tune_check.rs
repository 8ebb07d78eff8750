//! `tune --check` and `tune --report`: what people see of their data and of a run.

use std::fs;

use serde_json::{Value, json};

use crate::program::{Place, fixture};

fn write(place: &Place, name: &str, lines: &[Value]) -> String {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    fs::write(place.path(name), text).expect("written");
    name.to_owned()
}

#[test]
fn a_check_says_what_is_learnt_and_marks_it() {
    let place = Place::new();
    let turn = |question: &str, answer: &str| json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "id": 1});
    let data =
        write(&place, "d.jsonl", &[turn("Hi, I am jo@firm.de", "Hello"), turn("Who?", "A fox"), turn("Who?", "A fox")]);
    for model in [fixture("parity/qwen2"), fixture("parity/qwen3")] {
        let args = ["tune", "--check", "--model", &model, "--data", &data];
        let outcome = place.run(&args).exits(0);
        for part in [
            "records: 3, samples: 3",
            "each line a conversation (`messages`)",
            "records that repeat an earlier one: 1 (line 2 and line 3)",
            "records with personal data: 1 (1 e-mail address)",
            "nothing reads the keys `id` (3 times)",
            "\u{27e6}A fox<|im_end|>\u{27e7}",
        ] {
            assert!(outcome.out.contains(part), "`{part}` is not in: {}", outcome.out);
        }
        let value = place.run(&[&args[..], &["--json", "--show", "1"]].concat()).exits(0).json();
        assert_eq!((value["samples"].as_u64(), value["duplicates"].as_u64()), (Some(3), Some(1)), "{value}");
        assert_eq!(value["files"][0]["sha256"].as_str().map(str::len), Some(64));
        let pieces = value["shown"][0]["pieces"].as_array().expect("pieces");
        let learnt: Vec<&Value> = pieces.iter().filter(|piece| piece["trained"] == true).collect();
        assert_eq!(learnt.len(), 1);
        assert_eq!(learnt[0]["text"], "Hello<|im_end|>");
        assert!(value["lengths"]["trained_tokens"].as_u64() < value["lengths"]["total_tokens"].as_u64());
    }
}

#[test]
fn labels_of_a_table_are_counted_under_the_names_given() {
    let place = Place::new();
    let text = "id;body;kind\n1;\"My card; lost\";card\n2;Top up failed;top up\n3;My card;card\n4;Top up;top up\n";
    fs::write(place.path("d.csv"), text).expect("written");
    let model = fixture("parity/qwen2");
    let args =
        ["tune", "--check", "--model", &model, "--data", "d.csv", "--text-column", "body", "--label-column", "kind"];
    let value = place.run(&[&args[..], &["--json"]].concat()).exits(0).json();
    assert_eq!(value["objective"], "label");
    assert_eq!(value["labels"], json!([{"label": "card", "samples": 2}, {"label": "top up", "samples": 2}]));
    place.run(&args[..6]).fails_with(1, &["found the columns `id`, `body`, `kind`", "--label-column"]);
}

#[test]
fn faults_end_a_check_with_every_line_and_reason() {
    let place = Place::new();
    let good = json!({"prompt": "a", "completion": "b"});
    let data = write(&place, "d.jsonl", &[good.clone(), json!({"prompt": "a"}), json!(3), good]);
    let model = fixture("parity/qwen2");
    let args = ["tune", "--check", "--model", &model, "--data", &data];
    place.run(&args).fails_with(
        1,
        &["d.jsonl: 2 faults", "d.jsonl, line 2: this line is of no known form", "line 3: found a number"],
    );
    let outcome = place.run(&[&args[..], &["--json"]].concat()).exits(1);
    let value = outcome.json();
    assert_eq!((value["total"].as_u64(), value["faults"][1]["line"].as_u64()), (Some(2), Some(3)), "{value}");
    let long = json!({"prompt": "a", "completion": "word ".repeat(200)});
    let data = write(&place, "long.jsonl", &[long]);
    let args = ["tune", "--check", "--model", &model, "--data", &data, "--context", "100"];
    place.run(&args).fails_with(1, &["line 1: the sample has", "and the context 100", "--too-long cut"]);
    let outcome = place.run(&[&args[..], &["--too-long", "cut"]].concat()).exits(0);
    assert!(outcome.out.contains("samples cut to the length of the context: 1"), "{}", outcome.out);
    place.run(&["tune", "--model", &model]).fails_with(2, &["there is nothing"]);
}

#[test]
fn a_run_folder_becomes_a_page() {
    let place = Place::new();
    fs::create_dir(place.path("run")).expect("a folder");
    let step = |step: u64| json!({"step": step, "loss": 2.0 / step as f64, "lr": 1e-4, "tokens": 100, "ms": 50});
    fs::write(place.path("run/metrics.jsonl"), format!("{}\n{}\n", step(1), step(2))).expect("written");
    let outcome = place.run(&["tune", "--report", "run"]).exits(0);
    assert_eq!(outcome.out.trim(), "run/report.html");
    let page = fs::read_to_string(place.path("run/report.html")).expect("a page");
    assert!(page.contains("<svg") && page.contains("2.0000 and 1.0000"), "{page}");
    place.run(&["tune", "--report", "nowhere"]).fails_with(1, &["`nowhere` holds no figures of a run"]);
}

#[test]
fn a_label_that_outweighs_another_is_told_of() {
    let (place, model) = (Place::new(), fixture("parity/qwen2"));
    for (rare, is_told) in [(2, true), (20, false)] {
        let label = |count: usize, label: &'static str| {
            (0..count).map(move |i| json!({"text": format!("{label} {i}"), "label": label}))
        };
        let data = write(&place, "labels.jsonl", &label(60, "often").chain(label(rare, "seldom")).collect::<Vec<_>>());
        let told = place.run(&["tune", "--check", "--model", &model, "--data", &data]).exits(0);
        assert_eq!(told.out.contains("has 30 times the samples of the smallest"), is_told, "{}", told.out);
    }
}
