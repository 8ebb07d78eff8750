//! `run --image`: images and films in questions, from folders and from GGUF with mmproj, and what is refused.

use serde_json::Value;

use crate::program::{Outcome, Place, fixture};
use crate::recorded::{self, Tensor};

/// `run` with a greedy answer as JSON.
fn ask(place: &Place, model: &str, images: &[&str], more: &[&str]) -> Outcome {
    asks(place, model, "What is this?", images, more)
}

fn asks(place: &Place, model: &str, prompt: &str, images: &[&str], more: &[&str]) -> Outcome {
    let mut args = vec!["run", "--model", model, prompt, "--json", "--max-tokens", "8", "--temperature", "0"];
    args.extend(images.iter().flat_map(|image| ["--image", image]));
    args.extend(more);
    place.run(&args)
}

fn photo() -> String {
    fixture("images/photo.png")
}

#[test]
fn a_folder_and_a_gguf_with_mmproj_give_one_answer_about_images() {
    let place = Place::new();
    let (photo, second) = (photo(), fixture("images/tiny.png"));
    for name in ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"] {
        let folder = fixture(&format!("parity/{name}"));
        let gguf = fixture(&format!("parity/{name}/model.gguf"));
        // As it is: the tiny GGUF files have lost a control token that their chat template writes.
        let prompt = "Is <|vision_start|><|image_pad|><|vision_end|> as <|vision_start|><|image_pad|><|vision_end|>?";
        let of_folder = asks(&place, &folder, prompt, &[&photo, &second], &["--raw"]).exits(0);
        let of_gguf = asks(&place, &gguf, prompt, &[&photo, &second], &["--raw"]).exits(0);
        for key in ["prompt_ids", "ids", "text", "image_tokens"] {
            assert_eq!(of_folder.json()[key], of_gguf.json()[key], "{name}: {key}");
        }
        // The number of tokens is told before the answer, and is the prompt's.
        let told: Vec<u64> = of_folder.err.lines().filter_map(tokens_told).collect();
        let answer = of_folder.json();
        assert_eq!((told.len(), told.iter().sum::<u64>()), (2, answer["image_tokens"].as_u64().expect("a number")));
        let placeholders = answer["prompt_ids"].as_array().expect("ids").iter().filter(|id| **id == 301).count();
        assert_eq!(Some(placeholders as u64), answer["image_tokens"].as_u64(), "{name}");
        // A chat has the places for them; the other order is another prompt, and no image yet another.
        let chat = ask(&place, &folder, &[&photo, &second], &[]).exits(0).json();
        assert_eq!(chat["image_tokens"], answer["image_tokens"], "{name}");
        let swapped = ask(&place, &folder, &[&second, &photo], &[]).exits(0).json();
        assert_ne!(swapped["prompt_ids"], chat["prompt_ids"], "{name}");
        assert!(ask(&place, &folder, &[], &[]).exits(0).json().get("image_tokens").is_none());
    }
}

/// The tokens of a line such as `photo.png: 1 x 12 x 18 patches, 54 tokens`.
fn tokens_told(line: &str) -> Option<u64> {
    line.strip_suffix(" tokens")?.rsplit_once(" patches, ")?.1.parse().ok()
}

#[test]
fn what_an_image_shows_decides_the_answer_and_threads_do_not() {
    let place = Place::new();
    let model = fixture("parity/qwen2.5-vl");
    let logprobs = |image: &str, threads: &str| -> Value {
        ask(&place, &model, &[image], &["--logprobs", "3", "--threads", threads]).exits(0).json()["logprobs"].clone()
    };
    let photo = photo();
    let one = logprobs(&photo, "1");
    assert_eq!(one, logprobs(&photo, "3"));
    assert_ne!(one, logprobs(&fixture("images/gray.png"), "1"));
}

#[test]
fn a_folder_of_frames_is_shown_as_a_film() {
    let place = Place::new();
    let frames = place.path("frames");
    std::fs::create_dir(&frames).expect("a folder");
    for name in ["1.png", "2.png", "3.png"] {
        std::fs::copy(fixture("images/exact.png"), frames.join(name)).expect("copied");
    }
    let film = frames.to_str().expect("plain");
    for name in ["qwen2.5-vl", "qwen3-vl", "qwen3.5-vision"] {
        let model = fixture(&format!("parity/{name}"));
        let slow = ask(&place, &model, &[film], &["--fps", "0.1"]).exits(0);
        assert!(slow.err.contains("frames: 2 x "), "{name}: {}", slow.err);
        let answer = slow.json();
        let placeholders = answer["prompt_ids"].as_array().expect("ids").iter().filter(|id| **id == 302).count();
        assert_eq!(Some(placeholders as u64), answer["image_tokens"].as_u64(), "{name}");
        // Later models read the time of each step.
        let fast = ask(&place, &model, &[film], &[]).exits(0).json();
        assert_eq!(fast["prompt_ids"] == answer["prompt_ids"], name == "qwen2.5-vl", "{name}");
    }
}

#[test]
fn raw_prompts_and_ids_have_places_for_images() {
    let place = Place::new();
    let (model, image) = (fixture("parity/qwen2-vl"), fixture("images/tiny.png"));
    let raw = |prompt: &str| {
        place.run(&["run", "--model", &model, prompt, "--raw", "--image", &image, "--json", "--max-tokens", "4"])
    };
    let answer = raw("Look: <|image_pad|>!").exits(0).json();
    assert_eq!(answer["image_tokens"], 6);
    raw("Look!").fails_with(1, &["0 placeholder tokens of images, expected 1"]);
    let ids = "5,301,301,301,301,301,301,6";
    let of_ids = ["run", "--model", &model, "--prompt-ids", ids, "--image", &image, "--json", "--max-tokens", "4"];
    place.run(&of_ids).exits(0);
}

#[test]
fn what_cannot_be_seen_is_said_in_one_message_before_anything_is_loaded() {
    let place = Place::new();
    let (photo, vision) = (photo(), fixture("parity/qwen3-vl"));
    let refused = |model: &str, image: &str, more: &[&str], parts: &[&str]| {
        let outcome = ask(&place, model, &[image], more).fails_with(1, parts);
        assert!(outcome.out.is_empty(), "{outcome:?}");
    };
    let file = |name: &str, bytes: &[u8]| {
        let path = place.path(name);
        std::fs::write(&path, bytes).expect("written");
        path.to_str().expect("plain").to_owned()
    };
    let png = std::fs::read(&photo).expect("a fixture");
    refused(&vision, &file("cut.png", &png[..5000]), &[], &["cut.png", "cut short", "hint: "]);
    refused(&vision, &file("words.txt", b"hello"), &[], &["words.txt", "expected PNG, JPEG, WebP or GIF"]);
    refused(&vision, "none.png", &[], &["none.png", "cannot be read"]);
    // A header that promises 4 gigapixels, and nothing behind it.
    let bomb = file("bomb.gif", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0");
    refused(&vision, &bomb, &[], &["bomb.gif", "65535 x 65535 pixels", "hint: "]);
    refused(&fixture("parity/qwen3"), &photo, &[], &["reads text only", "take a model with vision"]);
    let alone = place.path("alone.gguf");
    std::fs::copy(fixture("parity/qwen3-vl/model.gguf"), &alone).expect("copied");
    let alone = alone.to_str().expect("plain");
    refused(alone, &photo, &[], &["alone.gguf", "expected a mmproj file beside it or named with --mmproj, found none"]);
    let others = fixture("parity/qwen2-vl/mmproj.gguf");
    refused(alone, &photo, &["--mmproj", &others], &["tower of another model", "expected", "same place as the model"]);
    refused(alone, &photo, &["--mmproj", alone], &["alone.gguf holds a qwen3vl model", "expected the vision tower"]);
    refused(alone, &photo, &["--mmproj", "none.gguf"], &["none.gguf"]);
    let own = fixture("parity/qwen3-vl/mmproj.gguf");
    ask(&place, alone, &[&photo], &["--mmproj", &own]).exits(0);
    // Larger than the context.
    refused(&vision, &photo, &["--ctx", "64"], &["tokens and the context holds 64"]);
    ask(&place, &vision, &[&photo], &["--fps", "4"]).fails_with(2, &["--fps is for films"]);
}

#[test]
fn patches_that_are_not_their_grids_are_refused_with_both() {
    let (place, folder) = (Place::new(), fixture("parity/qwen3-vl"));
    let record = recorded::read(format!("{folder}/expected.safetensors").as_ref());
    let ids = record["input_ids"].ids().iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let logits = |pixels: &Tensor, shape: &[usize], grids: &[i64]| {
        let bytes = grids.iter().flat_map(|n| n.to_le_bytes()).collect();
        let grids = Tensor { shape: shape.to_vec(), bytes, ..record["image_grid_thw"].clone() };
        let tensors = [("pixel_values".to_owned(), pixels.clone()), ("image_grid_thw".to_owned(), grids)];
        recorded::write(&place.path("pixels.safetensors"), &tensors.into());
        let args = ["logits", "--model", &folder, "--ids", &ids, "--pixels", "pixels.safetensors", "--out", "out"];
        place.run(&args)
    };
    let pixels = &record["pixel_values"];
    logits(pixels, &[2, 3], &[1, 8, 6, 1, 4, 10]).exits(0);
    let processor = "hint: a grid is (time steps, rows, columns), counted in patches";
    let refused = |pixels: &Tensor, shape: &[usize], grids: &[i64], told: &str, hint: &str| {
        logits(pixels, shape, grids).fails_with(1, &[told, hint]);
    };
    // Swapped, they are as many patches in all.
    let told = "22 placeholder tokens of images, expected 22 in runs of 10, 12, found runs of 12, 10";
    refused(pixels, &[2, 3], &[1, 4, 10, 1, 8, 6], told, "hint: each image has one run");
    let told = "found 88 patches, expected 80 by `image_grid_thw`: 40 of (1, 4, 10), 40 of (1, 4, 10)";
    refused(pixels, &[2, 3], &[1, 4, 10, 1, 4, 10], told, processor);
    refused(pixels, &[1, 3], &[1, 8, 6], "found 88 patches, expected 48", processor);
    refused(pixels, &[1, 3], &[1, 1 << 40, 6], "too many of (1, 1099511627776, 6)", processor);
    refused(pixels, &[3, 2], &[1, 8, 6, 1, 4, 10], "found the shape [3, 2], expected (images, 3)", processor);
    let narrow = Tensor { shape: vec![176, 768], ..pixels.clone() };
    refused(&narrow, &[2, 3], &[1, 8, 6, 1, 4, 10], "found patches of 768 values, expected 1536", processor);
    // Time last is as many patches too, and no grid of this tower's.
    let told = "a grid of (8, 6, 1) patches, expected rows and columns in multiples of 2";
    refused(pixels, &[2, 3], &[8, 6, 1, 1, 4, 10], told, processor);
}

#[test]
fn a_mmproj_without_patches_is_held_against_the_model_and_placeholders_are_noted() {
    let (place, folder) = (Place::new(), fixture("parity/qwen3-vl"));
    let logits = |ids: &str, mmproj: &str| {
        let mmproj = fixture(&format!("parity/{mmproj}/mmproj.gguf"));
        place.run(&["logits", "--model", &folder, "--mmproj", &mmproj, "--ids", ids, "--out", "out"])
    };
    assert!(!logits("5,6,7", "qwen3-vl").exits(0).err.contains("placeholders"));
    let noted = logits("5,301,301,7", "qwen3-vl").exits(0);
    assert!(noted.err.contains("note: found 2 placeholders of images among the ids and no --pixels"), "{noted:?}");
    logits("5,6,7", "qwen2-vl").fails_with(1, &["tower of another model", "qwen2_vl", "qwen3vl_merger"]);
}

#[test]
fn windows_that_no_file_states_are_told_to_be_a_guess() {
    let place = Place::new();
    for file in ["model.gguf", "mmproj.gguf", "expected.safetensors"] {
        std::fs::copy(fixture(&format!("parity/qwen2.5-vl/{file}")), place.path(file)).expect("copied");
    }
    let ids = recorded::read(&place.path("expected.safetensors"))["input_ids"].ids();
    let ids = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let args = ["logits", "--model", "model.gguf", "--ids", &ids, "--pixels", "expected.safetensors", "--out", "out"];
    let told = "does not state the side of its windows, taken to be the 112 pixels";
    let guessed = place.run(&args).exits(0);
    assert!(guessed.err.contains(told), "{guessed:?}");
    std::fs::copy(fixture("parity/qwen2.5-vl/config.json"), place.path("config.json")).expect("copied");
    assert!(!place.run(&args).exits(0).err.contains(told));
}
