//! Models that see: the recorded answers from both file formats, the same bits however a prompt is cut and whatever else is
//! computed, every spelling of the same tower, and what is refused.

#[allow(dead_code)] // shared with tests that ask for more
#[path = "moe_run/mod.rs"]
mod moe_run;
#[path = "vision_fit/mod.rs"]
mod vision_fit;
#[path = "vision_run/mod.rs"]
mod vision_run;

use moe_run::{Tensor, assert_same_bits, checkpoint, compute, fixture, gguf, tensors, try_load};
use qwenkit_formats::{
    ModelFiles,
    gguf::{Array, Metadata, Value},
};
use qwenkit_kernels::Compute;
use qwenkit_models::{Grid, Model, Pixels, Tower, TowerBuffers};
use qwenkit_tensor::DType;
use serde_json::json;
use vision_run::{Record, Sighted, assert_near, mmproj, record};

/// Float32 sums in another order differ by this much at most; behind recurrent layers by more.
const LIMIT: f32 = 5e-4;
const LIMIT_RECURRENT: f32 = 2e-3;

const NAMES: [&str; 5] = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3.5-vision"];
const WITH_GGUF: [&str; 3] = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"];

fn limit(name: &str) -> f32 {
    if name == "qwen3.5-vision" { LIMIT_RECURRENT } else { LIMIT }
}

fn assert_parity(seeing: &Sighted, record: &Record, limit: f32, what: &str) {
    assert_near(&seeing.logits(record, &[]), &record.logits, limit, what);
    assert_eq!(seeing.greedy(record), record.greedy_ids, "{what}: greedy tokens");
}

#[test]
fn recorded_answers_from_checkpoints() {
    for name in NAMES {
        let seeing = Sighted::open(&fixture(name), None);
        assert_parity(&seeing, &record(name, "expected"), limit(name), name);
    }
}

#[test]
fn recorded_answers_from_gguf_with_mmproj() {
    for name in WITH_GGUF {
        let seeing = Sighted::open(&fixture(name).join("model.gguf"), Some(&fixture(name).join("mmproj.gguf")));
        assert_parity(&seeing, &record(name, "expected"), limit(name), name);
    }
}

#[test]
fn recorded_answers_about_films() {
    for name in ["qwen2.5-vl", "qwen3-vl"] {
        let seeing = Sighted::open(&fixture(name), None);
        assert_parity(&seeing, &record(name, "films"), LIMIT, &format!("{name}, films"));
    }
}

#[test]
fn any_cut_of_the_prompt_gives_the_same_bits() {
    for name in NAMES {
        let (seeing, record) = (Sighted::open(&fixture(name), None), record(name, "expected"));
        let whole = seeing.logits(&record, &[]);
        for cut in 1..record.input_ids.len() {
            assert_same_bits(&seeing.logits(&record, &[cut]), &whole, &format!("{name} cut at {cut}"));
        }
        let every: Vec<usize> = (1..record.input_ids.len()).collect();
        assert_same_bits(&seeing.logits(&record, &every), &whole, &format!("{name} token by token"));
    }
}

#[test]
fn a_sequence_with_images_in_a_batch_answers_as_alone() {
    for name in ["qwen2-vl", "qwen3-vl-moe", "qwen3.5-vision"] {
        let record = record(name, "expected");
        let alone = Sighted::open(&fixture(name), None).logits(&record, &[]);
        for threads in [1, 3] {
            let seeing = Sighted::open_with(&fixture(name), None, Compute::new(threads, compute().isa()));
            seeing.assert_batch_as_alone(&record, &alone, &format!("{name} on {threads} threads"));
        }
    }
}

#[test]
fn an_image_has_the_same_vectors_after_any_other() {
    for name in NAMES {
        let record = record(name, "expected");
        let seeing = Sighted::open(&fixture(name), None);
        let alone: Vec<Vec<f32>> = record.images.iter().map(|image| seeing.look(&image.pixels)).collect();
        let mut buffers = TowerBuffers::default();
        for order in [[0, 1], [1, 0], [1, 1]] {
            for i in order {
                let again = seeing.tower.encode(&seeing.compute, &mut buffers, &record.images[i].pixels).unwrap();
                assert_same_bits(&again, &alone[i], &format!("{name}, image {i}"));
            }
        }
    }
}

/// A tower of the given type of weights is near that of f32, and says the same bits on any number of threads.
#[test]
fn towers_of_half_precision_and_quantised_ones_stay_near() {
    for dtype in [DType::BF16, DType::F16, DType::Q8_0] {
        let (name, record) = ("qwen3-vl", record("qwen3-vl", "expected"));
        let exact = Sighted::open(&fixture(name), None);
        let change = |tensor: &mut Tensor| {
            let matrix = tensor.shape.len() == 2 && tensor.name.ends_with(".weight") && !tensor.name.contains("embd");
            if matrix && !tensor.name.contains("norm") {
                vision_run::convert(tensor, dtype);
            }
        };
        let (_folder, path) = mmproj(name, |_| {}, |all| all.iter_mut().for_each(change));
        let open = |threads| {
            let compute = Compute::new(threads, compute().isa());
            Sighted::open_with(&fixture(name).join("model.gguf"), Some(&path), compute)
        };
        let (one, three) = (open(1), open(3));
        for image in &record.images {
            let (found, wanted) = (one.look(&image.pixels), exact.look(&image.pixels));
            assert_same_bits(&three.look(&image.pixels), &found, &format!("{dtype} on three threads"));
            let size = (wanted.iter().map(|x| x * x).sum::<f32>() / wanted.len() as f32).sqrt();
            let error = found.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / wanted.len() as f32;
            println!("{dtype}: error {:.4} of vectors around {size:.3}", error.sqrt());
            assert!(error.sqrt() < 0.05 * size, "{dtype}: error {} of vectors around {size}", error.sqrt());
        }
    }
}

#[test]
fn every_place_and_spelling_of_a_checkpoint_is_read() {
    let (name, record) = ("qwen2.5-vl", record("qwen2.5-vl", "expected"));
    let whole = Sighted::open(&fixture(name), None).logits(&record, &[]);
    // As transformers has saved it since 4.52.
    let mut all = tensors(&fixture(name));
    for tensor in &mut all {
        if let Some(rest) = tensor.name.strip_prefix("visual.") {
            tensor.name = format!("model.visual.{rest}");
        } else if let Some(rest) = tensor.name.strip_prefix("model.") {
            tensor.name = format!("model.language_model.{rest}");
        }
    }
    let folder = checkpoint(name, |_| {}, &all);
    assert_same_bits(&Sighted::open(folder.path(), None).logits(&record, &[]), &whole, "the longer names");
    // As it was published: one config for text and whole, sections in `rope_scaling`, no types of parts.
    let flatten = |config: &mut serde_json::Value| {
        let text = config["text_config"].as_object().unwrap().clone();
        let sections = text["rope_parameters"]["mrope_section"].clone();
        let object = config.as_object_mut().unwrap();
        object.remove("text_config");
        for (key, value) in text.into_iter().filter(|(key, _)| key != "model_type" && key != "rope_parameters") {
            object.insert(key, value);
        }
        object.insert("rope_theta".into(), json!(1e6));
        object.insert("rope_scaling".into(), json!({ "type": "mrope", "mrope_section": sections }));
        let vision = object["vision_config"].as_object_mut().unwrap();
        for key in ["model_type", "rope_parameters", "in_channels"] {
            vision.remove(key);
        }
        vision.insert("in_chans".into(), json!(3));
    };
    let folder = checkpoint(name, flatten, &tensors(&fixture(name)));
    assert_same_bits(&Sighted::open(folder.path(), None).logits(&record, &[]), &whole, "the published config");
}

/// Packed experts of Qwen3-VL as the hub has them, (E, D, 2 F) and (E, F, D), and as a converter that expects those makes GGUF
/// of the other form.
#[test]
fn experts_are_found_however_they_are_turned() {
    let (name, record) = ("qwen3-vl-moe", record("qwen3-vl-moe", "expected"));
    let whole = Sighted::open(&fixture(name), None).logits(&record, &[]);
    let mut all = tensors(&fixture(name));
    for tensor in all.iter_mut().filter(|t| t.name.contains("mlp.experts.")) {
        vision_run::turn(tensor);
    }
    let folder = checkpoint(name, |_| {}, &all);
    assert_same_bits(&Sighted::open(folder.path(), None).logits(&record, &[]), &whole, "transposed");

    let mut all = Vec::new();
    for tensor in tensors(&fixture(name)).into_iter().filter(|t| !t.name.contains("visual.")) {
        all.extend(vision_run::as_turned_gguf(tensor));
    }
    let text = Sighted::open(&fixture(name), None);
    let sections = Value::Array(Array::I32(vec![6, 5, 5, 0]));
    let (_folder, path) = gguf(
        "qwen3-vl",
        |meta| {
            let keys: Vec<(String, Value)> = meta
                .iter()
                .filter(|(k, _)| k.starts_with("qwen3vl."))
                .map(|(k, v)| (k.to_owned(), v.clone()))
                .collect();
            for (key, value) in keys {
                meta.set(&key.replace("qwen3vl.", "qwen3vlmoe."), value);
            }
            meta.set("general.architecture", Value::String("qwen3vlmoe".into()));
            meta.set("qwen3vlmoe.rope.dimension_sections", sections.clone());
            meta.set("qwen3vlmoe.expert_count", Value::U32(8));
            meta.set("qwen3vlmoe.expert_used_count", Value::U32(3));
            meta.set("qwen3vlmoe.expert_feed_forward_length", Value::U32(64));
        },
        &all,
    );
    let model = try_load(&path, &compute()).unwrap();
    let seeing = Sighted { model, ..text };
    assert_same_bits(&seeing.logits(&record, &[]), &whole, "turned while converting");
}

fn refusal(model: &std::path::Path, mmproj: Option<&std::path::Path>) -> String {
    let files = ModelFiles::open(model).unwrap();
    let mmproj = mmproj.map(|path| ModelFiles::open(path).unwrap());
    let compute = compute();
    let text = Model::load(&files, &compute, &mut |_| {}).unwrap();
    let tower = Tower::load(&files, mmproj.as_ref(), text.plan(), &compute, &mut |_| {});
    tower.map(|_| ()).unwrap_err().to_string()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn a_model_without_its_tower_or_with_anothers_is_refused() {
    let gguf_of = |name: &str| fixture(name).join("model.gguf");
    let mmproj_of = |name: &str| fixture(name).join("mmproj.gguf");
    assert_says(&refusal(&fixture("qwen2"), None), &["qwen2 reads text only"]);
    assert_says(&refusal(&gguf_of("qwen3-vl"), None), &["qwen3_vl", "--mmproj", "found none"]);
    let other = refusal(&gguf_of("qwen3-vl"), Some(&mmproj_of("qwen2-vl")));
    assert_says(&other, &["mmproj.gguf is the tower of another model", "architecture is qwen2_vl, expected qwen3_vl"]);
    let other = refusal(&gguf_of("qwen2-vl"), Some(&mmproj_of("qwen3-vl")));
    assert_says(&other, &["architecture is qwen3_vl, expected qwen2_vl or qwen2_5_vl"]);
    let other = refusal(&gguf_of("qwen3-vl"), Some(&gguf_of("qwen2")));
    assert_says(&other, &["model.gguf holds a qwen2 model, expected the vision tower of a model (mmproj)"]);
    let other = refusal(&gguf_of("qwen3-vl"), Some(&fixture("qwen3-vl")));
    assert_says(&other, &["a checkpoint folder"]);
    // One of the same shape and another generation.
    let other = refusal(&gguf_of("qwen2-vl"), Some(&mmproj_of("qwen2.5-vl")));
    assert_says(&other, &["tower of another model", "`Qwen2.5 Vl`", "that of `Qwen2 Vl`"]);
    // A text model that does not speak of the tower's inner layers has no use for them.
    let silent = |meta: &mut Metadata| {
        let mut without = Metadata::new(std::path::Path::new("model.gguf"));
        let others = meta.iter().filter(|(key, _)| !key.ends_with("n_deepstack_layers"));
        others.for_each(|(key, value)| without.set(key, value.clone()));
        *meta = without;
    };
    let (_folder, path) = gguf("qwen3-vl", silent, &tensors(&gguf_of("qwen3-vl")));
    let other = refusal(&path, Some(&mmproj_of("qwen3-vl")));
    assert_says(&other, &["number of DeepStack layers is 2, expected 0"]);
    // One of the same kind and another size.
    let widen = |tensor: &mut Tensor| {
        if tensor.name.starts_with("mm.2.") || tensor.name.contains(".fc2.") {
            tensor.shape[0] *= 2;
            tensor.bytes = tensor.bytes.repeat(2);
        }
    };
    let (_folder, path) = mmproj("qwen3-vl", |_| {}, |all| all.iter_mut().for_each(widen));
    assert_says(&refusal(&gguf_of("qwen3-vl"), Some(&path)), &["output width is 128, expected 64 as in", "model.gguf"]);
    let (_folder, path) = mmproj(
        "qwen3-vl",
        |meta| meta.set("clip.vision.is_deepstack_layers", Value::Array(Array::Bool(vec![true, false, false]))),
        |all| all.retain(|t| !t.name.starts_with("v.deepstack.1.")),
    );
    assert_says(&refusal(&gguf_of("qwen3-vl"), Some(&path)), &["number of DeepStack layers is 1, expected 2"]);
    let message = try_load(&mmproj_of("qwen3-vl"), &compute()).map(|_: Model| ()).unwrap_err().to_string();
    assert_says(&message, &["the image part of a model (mmproj)", "expected a model"]);
}

#[test]
fn tensors_too_few_too_many_and_of_other_shapes_are_refused() {
    let name = "qwen3-vl";
    let text = fixture(name).join("model.gguf");
    let with = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let (_folder, path) = mmproj(name, |_| {}, change);
        refusal(&text, Some(&path))
    };
    assert_says(&with(&|all| all.retain(|t| t.name != "v.blk.1.ln2.bias")), &["`v.blk.1.ln2.bias` [64] is missing"]);
    assert_says(
        &with(&|all| all.retain(|t| t.name != "v.patch_embd.weight.1")),
        &["`v.patch_embd.weight.1`", "is missing"],
    );
    let extra = |all: &mut Vec<Tensor>| {
        let more = Tensor { name: "v.blk.1.ls1.weight".into(), ..all[0].clone() };
        all.push(more);
    };
    assert_says(
        &with(&extra),
        &[
            "1 tensors belong to no part of a qwen3_vl model",
            "`v.blk.1.ls1.weight`",
            "the nearest that belongs to it is `v.blk.1.ln1.weight`",
        ],
    );
    let cut = |all: &mut Vec<Tensor>| {
        let tensor = all.iter_mut().find(|t| t.name == "v.blk.2.ffn_down.weight").unwrap();
        tensor.shape = vec![32, 96];
        tensor.bytes.truncate(32 * 96 * 4);
    };
    assert_says(
        &with(&cut),
        &[
            "`v.blk.2.ffn_down.weight`: expected [64, 96], found [32, 96]; the nearest that fits has 32 in place of 64 on axis 0",
        ],
    );

    let mut all = tensors(&fixture(name));
    all.push(Tensor { name: "model.visual.blocks.0.extra".into(), ..all[0].clone() });
    let folder = checkpoint(name, |_| {}, &all);
    assert_says(&refusal(folder.path(), None), &["the first is `model.visual.blocks.0.extra`"]);
    let without: Vec<Tensor> =
        tensors(&fixture(name)).into_iter().filter(|t| !t.name.starts_with("model.visual.")).collect();
    let folder = checkpoint(name, |_| {}, &without);
    assert_says(&refusal(folder.path(), None), &["`model.visual.patch_embed.proj.weight`", "is missing"]);
}

#[test]
fn a_config_that_contradicts_the_tensors_or_itself_is_refused_by_name() {
    for (key, value, parts) in [
        ("depth", json!(4), &["model.visual.blocks.3.", "is missing"][..]),
        ("depth", json!(2), &["belong to no part", "model.visual.blocks.2."]),
        ("depth", json!(0), &["`vision depth` is 0"]),
        (
            "hidden_size",
            json!(128),
            &["patch_embed.proj.weight`: expected [128, 3, 2, 16, 16], found [64, 3, 2, 16, 16]"],
        ),
        ("hidden_size", json!(65), &["`vision num_heads` is 4"]),
        ("intermediate_size", json!(48), &["linear_fc1.weight`: expected [48, 64], found [96, 64]"]),
        ("num_heads", json!(0), &["`vision num_heads` is 0"]),
        ("num_heads", json!(32), &["`vision num_heads` is 32, expected heads of a multiple of 4"]),
        ("patch_size", json!(14), &["expected [64, 3, 2, 14, 14], found [64, 3, 2, 16, 16]"]),
        ("temporal_patch_size", json!(1), &["expected [64, 3, 1, 16, 16]"]),
        ("spatial_merge_size", json!(4), &["merger.linear_fc1.weight`: expected [1024, 1024], found [256, 256]"]),
        ("out_hidden_size", json!(96), &["tower of another model", "output width is 96, expected 64"]),
        ("num_position_embeddings", json!(49), &["pos_embed.weight`: expected [49, 64], found [64, 64]"]),
        ("num_position_embeddings", json!(50), &["`num_position_embeddings` is 50, expected the rows of a square"]),
        ("deepstack_visual_indexes", json!([0]), &["belong to no part", "deepstack_merger_list.1."]),
        ("deepstack_visual_indexes", json!([1, 0]), &["`vision deepstack_visual_indexes` is [1, 0], expected rising"]),
        ("deepstack_visual_indexes", json!([0, 3]), &["expected rising numbers of its 3 blocks"]),
        ("hidden_act", json!("silu"), &["`vision_config.hidden_act` is `silu`"]),
        ("model_type", json!("siglip"), &["`vision_config.model_type` is `siglip`, expected qwen2_vl"]),
    ] {
        let change = |config: &mut serde_json::Value| config["vision_config"][key] = value.clone();
        let folder = checkpoint("qwen3-vl", change, &tensors(&fixture("qwen3-vl")));
        println!("{key} = {value}");
        assert_says(&refusal(folder.path(), None), parts);
    }
    for (key, value, part) in [
        ("image_token_id", json!(384), "`image_token_id` is 384, expected a token below 384"),
        ("mrope_section", json!([6, 5, 4]), "`mrope_section` is [6, 5, 4], expected three numbers with the sum 16"),
        ("mrope_section", json!([16]), "`mrope_section` is 1 numbers"),
    ] {
        let change = |config: &mut serde_json::Value| match key {
            "mrope_section" => config["text_config"]["rope_parameters"][key] = value.clone(),
            _ => config[key] = value.clone(),
        };
        let folder = checkpoint("qwen3-vl", change, &tensors(&fixture("qwen3-vl")));
        let message = try_load(folder.path(), &compute()).map(|_: Model| ()).unwrap_err().to_string();
        assert_says(&message, &[part]);
    }
}

/// Every number of the tower's config replaced by nonsense: each is refused with a reason or computes an image.
#[test]
fn hostile_numbers_are_refused_or_compute() {
    let hostile = [
        json!(0),
        json!(1),
        json!(3),
        json!(-1),
        json!(1u64 << 31),
        json!(u64::MAX),
        json!(1e300),
        json!("x"),
        json!([]),
        json!([7]),
        json!(null),
    ];
    let mut refused = 0;
    for name in ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"] {
        let folder = checkpoint(name, |_| {}, &tensors(&fixture(name)));
        let path = folder.path().join("config.json");
        let original: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let compute = compute();
        let text = try_load(folder.path(), &compute).unwrap();
        let image = &record(name, "expected").images[0].pixels;
        let keys = original["vision_config"].as_object().unwrap().keys();
        for (key, value) in keys.flat_map(|key| hostile.iter().map(move |value| (key, value))) {
            let mut config = original.clone();
            config["vision_config"][key] = value.clone();
            std::fs::write(&path, config.to_string()).unwrap();
            let files = ModelFiles::open(folder.path()).unwrap();
            match Tower::load(&files, None, text.plan(), &compute, &mut |_| {}) {
                Ok(tower) => drop(tower.encode(&compute, &mut TowerBuffers::default(), image)),
                Err(error) => refused += usize::from(!error.to_string().is_empty()),
            }
        }
    }
    assert!(refused > 200, "{refused}");
}

#[test]
fn patches_that_are_no_image_are_refused() {
    let seeing = Sighted::open(&fixture("qwen3-vl"), None);
    let with = |values: usize, (steps, rows, cols): (usize, usize, usize)| {
        let pixels = Pixels { values: vec![0.5; values], grid: Grid { steps, rows, cols } };
        let mut buffers = TowerBuffers::default();
        seeing.tower.encode(&seeing.compute, &mut buffers, &pixels).map(|_| ()).unwrap_err().to_string()
    };
    assert_says(&with(0, (1, 0, 4)), &["a grid of (1, 0, 4) patches"]);
    assert_says(&with(0, (0, 2, 4)), &["a grid of (0, 2, 4) patches"]);
    assert_says(&with(6 * 1536, (1, 2, 3)), &["a grid of (1, 2, 3) patches", "multiples of 2"]);
    assert_says(&with(100, (1, 2, 2)), &["100 values", "expected 6144, 1536 for each patch"]);
    assert_says(&with(100, (1 << 40, 1 << 40, 1 << 40)), &["patches"]);
}
