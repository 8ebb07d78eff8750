//! Records become tokens, and exactly the answers with their end tokens are learnt.

use std::path::PathBuf;

use qwenkit_tensor::TokenId;
use qwenkit_text::{ChatInput, ChatTemplate, Tokenizer, encode_chat};
use qwenkit_train::check::{Check, Survey, shown};
use qwenkit_train::data::{
    Answers, Data, DataError, Encoding, LabelKeys, Loading, Sample, Samples, TextSide, TooLong, divide, load,
};
use serde_json::{Value, json};

const TEMPLATES: [&str; 5] = ["qwen2.5", "qwen3", "qwen3-coder", "qwen3.5", "qwq"];

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/text").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

struct Model {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    stop_tokens: Vec<TokenId>,
}

impl Model {
    fn new(name: &str) -> Model {
        let tokenizer =
            Tokenizer::from_json(fixture("tokenizer.json").as_bytes(), "tokenizer.json").expect("a tokenizer");
        let stop_tokens =
            ["<|endoftext|>", "<|im_end|>"].iter().filter_map(|token| tokenizer.token_id(token)).collect();
        let template = ChatTemplate::new(&fixture(&format!("{name}.jinja")), name).expect("a template");
        Model { tokenizer, template, stop_tokens }
    }

    fn side(&self) -> TextSide<'_> {
        TextSide { tokenizer: &self.tokenizer, template: Some(&self.template), stop_tokens: &self.stop_tokens }
    }

    fn text(&self, tokens: &[TokenId]) -> String {
        self.tokenizer.decode(tokens, true)
    }

    /// What is learnt, a text for each run of learnt tokens.
    fn learnt(&self, sample: &Sample) -> Vec<String> {
        let pieces = shown(&self.tokenizer, &sample.tokens, &sample.trained);
        pieces.into_iter().filter(|piece| piece.trained).map(|piece| piece.text).collect()
    }
}

const ENCODING: Encoding = Encoding {
    context_tokens: 4096,
    too_long: TooLong::Refuse,
    answers: Answers::All,
    is_raw: false,
    parses_control_tokens: false,
};

fn load_with(model: &Model, name: &str, text: &str, encoding: Encoding) -> Result<(Data, Check), DataError> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(name);
    std::fs::write(&path, text).expect("written");
    let loading = Loading { files: vec![path], labels: LabelKeys::default(), encoding, known_labels: None };
    let mut survey = Survey::default();
    let data = load(&loading, model.side(), |file, line, record| survey.note(file, line, record))?;
    let check = Check::new(survey, &data);
    Ok((data, check))
}

fn lines(lines: &[Value]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

fn sft(model: &Model, record: Value, encoding: Encoding) -> Vec<Sample> {
    let loaded = load_with(model, "d.jsonl", &record.to_string(), encoding);
    let (data, _) = loaded.unwrap_or_else(|error| panic!("{record}: {error}"));
    match data.samples {
        Samples::Sft(samples) => samples,
        other => panic!("{other:?}"),
    }
}

fn fault(model: &Model, text: &str, encoding: Encoding) -> String {
    load_with(model, "d.jsonl", text, encoding).expect_err("a fault").to_string()
}

fn conversation() -> Value {
    json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."},
    ]})
}

#[test]
fn in_every_template_exactly_the_answers_and_their_end_tokens_are_learnt() {
    for name in TEMPLATES {
        let model = Model::new(name);
        let samples = sft(&model, conversation(), ENCODING);
        // Templates that print earlier answers as they ask for them need one sequence for all turns.
        let learnt: Vec<Vec<String>> = samples.iter().map(|sample| model.learnt(sample)).collect();
        let (first, second) = ("Hello<|im_end|>".to_owned(), "A fox.<|im_end|>".to_owned());
        match name {
            "qwen2.5" | "qwen3-coder" => assert_eq!(learnt, [vec![first, second]], "{name}"),
            _ => assert_eq!(learnt, [vec![first], vec![second]], "{name}"),
        }
        for sample in &samples {
            assert_eq!(sample.tokens.len(), sample.trained.len());
            assert_eq!(sample.trained.last(), Some(&true), "the end token is learnt");
        }
        let last = sft(&model, conversation(), Encoding { answers: Answers::Last, ..ENCODING });
        assert_eq!(
            last.iter().map(|sample| model.learnt(sample)).collect::<Vec<_>>(),
            [["A fox.<|im_end|>"]],
            "{name}"
        );
    }
}

#[test]
fn a_learnt_token_stands_behind_exactly_the_tokens_that_inference_reads() {
    let model = Model::new("qwen2.5");
    let samples = sft(&model, conversation(), ENCODING);
    let messages = conversation()["messages"].as_array().expect("messages").clone();
    for turn in [2, 4] {
        let messages = Value::Array(messages[..turn].to_vec());
        let input = ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() };
        let prompt = encode_chat(&model.template, &model.tokenizer, &input).expect("a prompt").ids;
        assert!(samples[0].tokens.starts_with(&prompt));
        assert!(samples[0].trained[prompt.len()] && !samples[0].trained[prompt.len() - 1]);
    }
}

#[test]
fn answers_of_weight_0_are_given_and_not_learnt() {
    let model = Model::new("qwen2.5");
    let mut record = conversation();
    record["messages"][2]["weight"] = json!(0);
    let samples = sft(&model, record, ENCODING);
    assert_eq!(samples.iter().map(|sample| model.learnt(sample)).collect::<Vec<_>>(), [["A fox.<|im_end|>"]]);
}

#[test]
fn completions_are_turns_of_a_conversation_or_plain_text() {
    let model = Model::new("qwen2.5");
    let record = json!({"prompt": "2+2=", "completion": "4"});
    let chat = sft(&model, record.clone(), ENCODING).remove(0);
    assert_eq!(model.learnt(&chat), ["4<|im_end|>"]);
    assert!(model.text(&chat.tokens).contains("<|im_start|>user\n2+2=<|im_end|>"));
    let raw = sft(&model, record, Encoding { is_raw: true, ..ENCODING }).remove(0);
    assert_eq!(model.text(&raw.tokens), "2+2=4<|endoftext|>");
    assert_eq!(model.learnt(&raw), ["4<|endoftext|>"]);
    let whole = fault(&model, "{\"prompt\": \"\", \"completion\": \"4\"}", Encoding { is_raw: true, ..ENCODING });
    assert!(whole.contains("line 1: all tokens of the sample are learnt from"), "{whole}");
}

#[test]
fn plain_texts_are_learnt_whole_and_control_tokens_are_text_unless_asked_for() {
    let model = Model::new("qwen2.5");
    let record = json!({"text": "a<|im_end|>"});
    let (data, check) = load_with(&model, "d.jsonl", &record.to_string(), ENCODING).expect("a text");
    let Samples::Sft(samples) = &data.samples else { panic!("texts") };
    assert!(samples[0].trained.iter().all(|&trained| trained));
    assert_eq!(samples[0].tokens.last(), model.tokenizer.token_id("<|endoftext|>").as_ref());
    assert!(samples[0].tokens.len() > 4, "the end token is spelt out");
    assert!(
        check.remarks.iter().any(|remark| remark.starts_with("texts that spell control tokens such as <|im_end|>: 1;")),
        "{check:?}"
    );
    let parsed = sft(&model, record, Encoding { parses_control_tokens: true, ..ENCODING }).remove(0);
    assert_eq!(model.text(&parsed.tokens), "a<|im_end|>");
    assert_eq!(parsed.tokens.len(), 2);
}

#[test]
fn samples_longer_than_the_context_are_faults_cut_or_left_out_and_told() {
    let model = Model::new("qwen2.5");
    let long = json!({"prompt": "q", "completion": "word ".repeat(300)});
    let short = json!({"prompt": "q", "completion": "w"});
    let text = lines(&[short, long.clone()]);
    let whole = sft(&model, long, ENCODING)[0].tokens.len();
    let encoding = Encoding { context_tokens: whole - 7, ..ENCODING };
    let refused = fault(&model, &text, encoding);
    assert!(
        refused.contains(&format!("line 2: the sample has {whole} tokens, and the context {}", whole - 7)),
        "{refused}"
    );
    let (data, check) =
        load_with(&model, "d.jsonl", &text, Encoding { too_long: TooLong::Cut, ..encoding }).expect("cut");
    let Samples::Sft(samples) = data.samples else { panic!("conversations") };
    assert_eq!((samples[1].tokens.len(), samples[1].cut_tokens, samples[0].cut_tokens), (whole - 7, 7, 0));
    assert_eq!(check.remarks, ["samples cut to the length of the context: 1"]);
    let (data, check) =
        load_with(&model, "d.jsonl", &text, Encoding { too_long: TooLong::LeaveOut, ..encoding }).expect("left");
    assert_eq!(data.samples.len(), 1);
    assert_eq!((check.records, check.samples), (2, 1));
    assert_eq!(check.remarks, ["records left out, being longer than the context: 1"]);
    let away = fault(&model, &text, Encoding { too_long: TooLong::Cut, context_tokens: 10, ..encoding });
    assert!(
        away.contains("line 1: cut to the 10 tokens of the context, the sample keeps nothing of its answer"),
        "{away}"
    );
    let none = Encoding { too_long: TooLong::LeaveOut, context_tokens: 10, ..encoding };
    assert!(fault(&model, &text, none).contains("no sample is left"));
    // Plain texts lose nothing: each piece begins with the token before it.
    let text = json!({"text": "word ".repeat(300)});
    let whole = sft(&model, text.clone(), ENCODING).remove(0).tokens;
    for context_tokens in [100, whole.len() - 1, 2] {
        let pieces = sft(&model, text.clone(), Encoding { too_long: TooLong::Cut, context_tokens, ..encoding });
        let mut joined = vec![whole[0]];
        for piece in &pieces {
            assert_eq!(piece.tokens[0], joined[joined.len() - 1]);
            assert!(piece.tokens.len() <= context_tokens && piece.trained[1..].iter().all(|&trained| trained));
            joined.extend(&piece.tokens[1..]);
        }
        assert!(joined == whole, "{context_tokens}");
    }
}

#[test]
fn preferences_learn_what_differs_behind_the_same_prompt() {
    for name in TEMPLATES {
        let model = Model::new(name);
        let text = json!({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}).to_string();
        let (data, check) = load_with(&model, "d.jsonl", &text, ENCODING).expect("a preference");
        let Samples::Preference(pairs) = data.samples else { panic!("preferences") };
        assert_eq!(model.learnt(&pairs[0].chosen), ["Hello<|im_end|>"], "{name}");
        assert_eq!(model.learnt(&pairs[0].rejected), ["What?<|im_end|>"], "{name}");
        let given = |sample: &Sample| sample.trained.iter().take_while(|trained| !**trained).count();
        let count = given(&pairs[0].chosen);
        assert_eq!(pairs[0].chosen.tokens[..count], pairs[0].rejected.tokens[..given(&pairs[0].rejected)]);
        assert_eq!(check.objective, "preference");
    }
}

#[test]
fn labels_are_numbered_by_name_and_a_label_of_one_sample_is_a_fault() {
    let model = Model::new("qwen2.5");
    let csv = "text,category\nWhere is my card?,card\nMy top up failed,top_up\n\"Card, please\",card\nTop up?,top_up\n";
    let (data, check) = load_with(&model, "d.csv", csv, ENCODING).expect("labels");
    assert_eq!(data.labels, ["card", "top_up"]);
    let Samples::Label(samples) = &data.samples else { panic!("labels") };
    assert_eq!(
        samples.iter().map(|sample| (sample.line, sample.label)).collect::<Vec<_>>(),
        [(2, 0), (3, 1), (4, 0), (5, 1)]
    );
    assert_eq!(model.text(&samples[2].tokens), "Card, please<|endoftext|>");
    assert_eq!(check.labels.iter().map(|label| label.samples).collect::<Vec<_>>(), [2, 2]);
    let label = |label: &str| json!({"text": "a b c", "label": label});
    let found = fault(
        &model,
        &lines(&[label("card_lost"), label("card_lots"), label("card_lost"), label("x"), label("x")]),
        ENCODING,
    );
    assert!(found.contains("line 2: the label `card_lots` occurs only here"), "{found}");
    assert!(found.contains("(there is `card_lost`)"), "{found}");
    let found = fault(&model, &lines(&[label("x"), label("x")]), ENCODING);
    assert!(found.contains("all samples have the label `x`"), "{found}");
    let numbers: Vec<Value> = [10, 9, 10, 9].map(|n| json!({"text": "a", "label": n})).to_vec();
    assert_eq!(load_with(&model, "d.jsonl", &lines(&numbers), ENCODING).expect("labels").0.labels, ["9", "10"]);
}

#[test]
fn what_repeats_contradicts_or_is_personal_is_told_with_its_lines() {
    let model = Model::new("qwen2.5");
    let long = "I have been waiting for my new card for more than two weeks now, where is it?";
    let sample = |text: &str, label: &str| json!({"text": text, "label": label});
    let text = lines(&[
        sample(long, "card"),
        sample("Write to jo@firm.de, please", "mail"),
        sample(long, "card"),
        sample(&long.replace('?', "!"), "card"),
        sample("Write to jo@firm.de, please", "card"),
        sample("A mail to somebody", "mail"),
    ]);
    let (_, check) = load_with(&model, "d.jsonl", &text, ENCODING).expect("labels");
    assert_eq!((check.duplicates, check.near_duplicates, check.contradictions), (1, 2, 1));
    assert_eq!((check.repeated[0].place.line, check.repeated[0].earlier.line), (3, 1));
    assert_eq!((check.near[0].place.line, check.near[1].place.line), (4, 5));
    assert_eq!((check.contradicting[0].place.line, check.contradicting[0].earlier.line), (5, 2));
    assert_eq!(check.personal_lines, 2);
    assert_eq!(check.personal_shown[0].place.line, 2);
    assert_eq!(check.personal_shown[0].shown, "jo@\u{2022}\u{2022}\u{2022}\u{2022}.\u{2022}\u{2022}");
    let json = serde_json::to_value(&check).expect("JSON");
    assert_eq!(json["personal"]["email"], 2);
}

#[test]
fn files_of_several_objectives_and_refusals_of_the_template_are_told() {
    let model = Model::new("qwen3.5");
    let folder = tempfile::tempdir().expect("a folder");
    let (one, two) = (folder.path().join("a.jsonl"), folder.path().join("b.jsonl"));
    std::fs::write(&one, "{\"text\": \"a b\"}\n").expect("written");
    std::fs::write(&two, "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"b\", \"label\": \"x\"}\n")
        .expect("written");
    let loading =
        Loading { files: vec![one, two], labels: LabelKeys::default(), encoding: ENCODING, known_labels: None };
    let error = load(&loading, model.side(), |_, _, _| ()).expect_err("two objectives").to_string();
    assert!(error.contains("a plain text") && error.contains("a text with a label"), "{error}");
    let greeting = json!({"messages": [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"}]});
    let error = fault(&model, &greeting.to_string(), ENCODING);
    assert!(error.contains("line 1: the model's chat template refuses"), "{error}");
    let plain = TextSide { template: None, ..model.side() };
    let loading = Loading { files: vec![folder.path().join("c.jsonl")], ..loading };
    std::fs::write(&loading.files[0], conversation().to_string()).expect("written");
    let error = load(&loading, plain, |_, _, _| ()).expect_err("no template").to_string();
    assert!(error.contains("the model has no chat template"), "{error}");
}

#[test]
fn the_division_depends_on_what_samples_say_and_keeps_equal_records_together() {
    let model = Model::new("qwen2.5");
    let record = |i: usize| json!({"text": format!("text {}", i % 150), "label": format!("{}", i % 3)});
    let of = |order: &[usize]| {
        let text = lines(&order.iter().map(|&i| record(i)).collect::<Vec<_>>());
        load_with(&model, "d.jsonl", &text, ENCODING).expect("labels").0.samples
    };
    let forward: Vec<usize> = (0..300).collect();
    let samples = of(&forward);
    let division = divide(&samples, 0.1, 1);
    assert_eq!(division.validation.len(), 30);
    assert_eq!(division.train.len() + division.validation.len(), 300);
    // Every text occurs twice, 150 lines apart.
    assert!(division.validation.iter().all(|at| division.validation.contains(&((at + 150) % 300))));
    assert_eq!(divide(&samples, 0.1, 1), division);
    assert_ne!(divide(&samples, 0.1, 2), division);
    let backward: Vec<usize> = (0..300).rev().collect();
    let mut other: Vec<usize> = divide(&of(&backward), 0.1, 1).validation.iter().map(|at| 299 - at).collect();
    other.sort_unstable();
    assert_eq!(other, division.validation);
    assert!(divide(&samples, 0.0, 1).validation.is_empty());
    // Whatever the share, every label keeps a sample to learn from.
    let division = divide(&samples, 1.0, 1);
    let Samples::Label(labelled) = &samples else { panic!("labels") };
    for label in 0..3 {
        assert!(division.train.iter().any(|&at| labelled[at].label == label));
    }
}

#[test]
fn the_example_of_the_recipe_can_be_learnt_by_every_template() {
    let text =
        std::fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tune/rename.jsonl"));
    let text = text.expect("the example");
    for name in TEMPLATES {
        let model = Model::new(name);
        let (data, check) = load_with(&model, "d.jsonl", &text, ENCODING).expect("conversations");
        assert_eq!((data.samples.len(), check.duplicates, check.contradictions), (30, 0, 0), "{name}");
        assert!(check.personal.is_empty());
        let Samples::Sft(samples) = data.samples else { panic!("conversations") };
        for (sample, line) in samples.iter().zip(text.lines()) {
            let record: Value = serde_json::from_str(line).expect("JSON");
            let answer = record["messages"][1]["content"].as_str().expect("an answer");
            assert_eq!(model.learnt(sample), [format!("{answer}<|im_end|>")], "{name}");
        }
    }
}
