//! Prompts with images: what is remembered of them, who may share it, and how images reach a chat.

use std::path::{Path, PathBuf};

use qwenkit_engine::{Ask, Error, Prompt, Session, TokenLogprobs, Visual};
use qwenkit_formats::ModelFiles;
use qwenkit_media::{Limits, Rgb};
use qwenkit_models::{Error as ModelError, Grid, Pixels};
use qwenkit_tensor::TokenId;
use qwenkit_text::ChatInput;
use serde_json::{Value, json};

use crate::fixture::{checkpoint, copy, greedy, open, options, tell};

const NAMES: [&str; 5] = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5-vision"];

fn seeing_with(path: &Path, mmproj: Option<&Path>) -> Result<Session, Box<Error>> {
    let (files, mmproj) = (ModelFiles::open(path).unwrap(), mmproj.map(|path| ModelFiles::open(path).unwrap()));
    Session::open_seeing(&files, mmproj.as_ref(), &options(Some(4096)), &mut |_| {}).map_err(Box::new)
}

fn seeing(name: &str) -> Session {
    seeing_with(&checkpoint(name), None).unwrap()
}

/// An image of noise.
fn noise(session: &Session, seed: u64, rows: usize, cols: usize) -> Visual {
    let values = session.vision().unwrap().plan.patch.values() * rows * cols;
    let value = |i: usize| {
        let hash = (i as u64 + 1).wrapping_mul(seed * 2 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    Visual::image(Pixels { values: (0..values).map(value).collect(), grid: Grid { steps: 1, rows, cols } })
}

/// Text and images in turn.
enum Part {
    Text(u32, usize),
    Image(u64),
}

/// A greedy ask of these parts, with log-probabilities.
fn ask(session: &Session, parts: &[Part]) -> Ask {
    let image_token = session.vision().unwrap().image_token;
    let (mut ids, mut visuals) = (Vec::new(), Vec::new());
    for part in parts {
        match *part {
            Part::Text(seed, len) => ids.extend((0..len as u32).map(|i| TokenId((seed + i * 7) % 250 + 3))),
            Part::Image(seed) => {
                let image = noise(session, seed, 12, 16);
                ids.extend(vec![image_token; session.vision().unwrap().tokens(&image)]);
                visuals.push(image);
            }
        }
    }
    Ask { visuals, logprobs: Some(20), ..greedy(Prompt::Ids(ids), 8) }
}

/// Tokens with their log-probabilities, and how much of the prompt was remembered.
fn told(session: &Session, parts: &[Part]) -> (Vec<TokenLogprobs>, usize) {
    let told = tell(session, ask(session, parts));
    (told.pieces.into_iter().flat_map(|piece| piece.logprobs).collect(), told.summary.cached_tokens)
}

#[test]
fn a_fork_of_a_prompt_with_an_image_has_the_same_bits_as_alone() {
    use Part::{Image, Text};
    // 48 tokens an image; pages are of 64.
    let forks: [(&str, &[Part]); 6] = [
        ("the trunk", &[Text(1, 70), Image(1), Text(2, 100)]),
        ("behind the image", &[Text(1, 70), Image(1), Text(2, 60), Text(9, 30)]),
        ("inside the text before it", &[Text(1, 65), Text(8, 20), Image(1), Text(2, 40)]),
        ("another image in its place", &[Text(1, 70), Image(2), Text(2, 100)]),
        ("one more image", &[Text(1, 70), Image(1), Text(2, 100), Image(3), Text(3, 10)]),
        ("the trunk again", &[Text(1, 70), Image(1), Text(2, 100)]),
    ];
    for name in NAMES {
        let shared = seeing(name);
        let mut cached = Vec::new();
        for (what, parts) in forks {
            let (found, remembered) = told(&shared, parts);
            let (alone, nothing) = told(&seeing(name), parts);
            assert_eq!((found.len(), nothing), (8, 0));
            let bits = |all: &[TokenLogprobs]| -> Vec<(TokenId, u32)> {
                all.iter().flat_map(|t| t.top.iter().map(|(id, p)| (*id, p.to_bits()))).collect()
            };
            assert_eq!(bits(&found), bits(&alone), "{name}, {what}");
            cached.push(remembered);
        }
        assert_eq!(cached[0], 0, "{name}");
        // A hybrid goes on only from states that were kept.
        if name != "qwen3.5-vision" {
            assert_eq!(cached[1..], [70 + 48 + 60, 65, 70, 70 + 48 + 100, 70 + 48 + 99], "{name}");
        } else {
            assert!(cached[4] >= 192 && cached[5] >= 192, "{name}: {cached:?}");
        }
    }
}

fn chat(content: Value) -> Prompt {
    let messages = json!([{ "role": "user", "content": content }]);
    Prompt::Chat(Box::new(ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() }))
}

fn image_file(name: &str) -> Rgb {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/images").join(name);
    qwenkit_media::read(&path, &Limits::default()).unwrap()
}

#[test]
fn a_folder_and_a_gguf_with_mmproj_say_the_same_of_an_image() {
    // Not as a chat: the tiny GGUF files have lost a control token that their template writes.
    let prompt = || Prompt::Text("<|vision_start|><|image_pad|><|vision_end|>What?".to_owned());
    for name in ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"] {
        let (model, mmproj): (PathBuf, PathBuf) =
            (checkpoint(name).join("model.gguf"), checkpoint(name).join("mmproj.gguf"));
        let both = [seeing(name), seeing_with(&model, Some(&mmproj)).unwrap()].map(|session| {
            let picture = session.pictures().unwrap().image(&image_file("tiny.png"), None).unwrap();
            let ids = session.prompt_ids_with(&prompt(), picture.visuals.clone()).unwrap();
            let told = tell(&session, Ask { visuals: picture.visuals, ..greedy(prompt(), 12) }).summary;
            assert_eq!(told.prompt_tokens, ids.len(), "{name}");
            (picture.grid, ids, told.ids)
        });
        assert_eq!(both[0], both[1], "{name}");
    }
}

#[test]
fn films_are_told_their_times_where_the_model_reads_them() {
    let frames = vec![image_file("exact.png"); 3];
    for (name, steps) in [("qwen2.5-vl", 1), ("qwen3-vl", 2)] {
        let session = seeing(name);
        let film = session.pictures().unwrap().film(&frames, 2.0).unwrap();
        assert_eq!((film.part_type(), film.grid.steps, film.visuals.len()), ("video", 2, steps), "{name}");
        let part = json!({ "type": "video", "times": film.times });
        let told = tell(&session, Ask { visuals: film.visuals.clone(), ..greedy(chat(json!([part])), 4) }).summary;
        assert!(told.prompt_tokens > film.tokens, "{name}");
        let expected: &[f64] = if steps == 2 { &[0.25, 1.0] } else { &[] };
        assert_eq!(film.times, expected, "{name}");
    }
}

#[test]
fn what_cannot_see_says_so_before_anything_is_loaded() {
    let photo = image_file("tiny.png");
    let blind = open(&checkpoint("qwen3-vl"), Some(64));
    assert!(matches!(blind.pictures().map(|_| ()), Err(Error::Model(ModelError::NoTower { .. }))));
    let text_only = open(&checkpoint("qwen3"), Some(64));
    assert!(matches!(text_only.pictures().map(|_| ()), Err(Error::Model(ModelError::Blind { .. }))));
    let refused = |path: &Path, mmproj: Option<&Path>| *seeing_with(path, mmproj).err().unwrap();
    let gguf = |name: &str, file: &str| checkpoint(name).join(file);
    let error = refused(&gguf("qwen3-vl", "model.gguf"), Some(&gguf("qwen2-vl", "mmproj.gguf")));
    assert!(matches!(error, Error::Model(ModelError::OtherTower { .. })), "{error}");
    let error = refused(&gguf("qwen3-vl", "model.gguf"), Some(&gguf("qwen3-vl", "model.gguf")));
    assert!(matches!(error, Error::Model(ModelError::NotATower { .. })), "{error}");
    let error = refused(&gguf("qwen3-vl", "model.gguf"), None);
    assert!(matches!(error, Error::Model(ModelError::NoTower { .. })), "{error}");
    let error = refused(copy("qwen3-vl").path(), None);
    assert!(matches!(error, Error::Format(_) | Error::NoProcessor { .. }), "{error}");
    // More and fewer images than the conversation has places for.
    let session = seeing("qwen2-vl");
    let picture = || session.pictures().unwrap().image(&photo, None).unwrap().visuals;
    for (content, visuals) in
        [(json!("No image"), picture()), (json!([{ "type": "image" }]), [picture(), picture()].concat())]
    {
        let error = session.ask(Ask { visuals, ..greedy(chat(content), 1) }).err().unwrap();
        assert!(matches!(error, Error::Placeholders { .. }), "{error}");
    }
    // What people type stands for no image.
    let typed = chat(json!([{ "type": "text", "text": "<|image_pad|>" }, { "type": "image" }]));
    tell(&session, Ask { visuals: picture(), ..greedy(typed, 1) });
}
