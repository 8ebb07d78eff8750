//! Tensors that do not make the model which the configuration promises: missing, foreign, of another shape or type.

use qwenkit_formats::gguf::Value;
use qwenkit_tensor::DType;
use serde_json::json;

use crate::{
    refusal::{FORMS, Form, assert_refused, outcome, planned},
    tiny::{SMALL, Shape, Tensor, Tiny},
};

/// Quantised rows of one block, so that K types have a whole one.
const WIDE: Shape = Shape { hidden_size: 256, intermediate_size: 256, layers: 1, ..SMALL };

fn name(tensor: &Tensor, form: Form) -> String {
    match form {
        Form::Gguf => tensor.gguf.clone(),
        Form::Checkpoint => tensor.hugging_face.clone(),
    }
}

/// Replaces a tensor's type and shape, with zero bytes of the right number.
fn replace(tensor: &mut Tensor, dtype: DType, shape: &[usize]) {
    tensor.bytes = vec![0; dtype.tensor_bytes(shape).unwrap()];
    (tensor.dtype, tensor.shape) = (dtype, shape.to_vec());
}

#[test]
fn every_missing_tensor_is_named() {
    for architecture in ["qwen2", "qwen3"] {
        let whole = Tiny::new(&Shape { architecture, ..SMALL });
        for i in 0..whole.tensors.len() {
            let mut tiny = whole.clone();
            let removed = tiny.tensors.remove(i);
            for form in FORMS {
                let named = name(&removed, form);
                // A GGUF file without output head is a model with a tied one.
                if named == "output.weight" {
                    assert_eq!(outcome(&tiny, form), Ok(()));
                    continue;
                }
                assert_refused(&tiny, form, &[&format!("`{named}`"), "missing", architecture], &named);
            }
        }
    }
}

#[test]
fn every_wrong_shape_is_named_with_both() {
    let whole = Tiny::new(&SMALL);
    for i in 0..whole.tensors.len() {
        let right = whole.tensors[i].shape.clone();
        let grown = |axis: usize| (0..right.len()).map(|a| right[a] + usize::from(a == axis)).collect::<Vec<_>>();
        let mut shapes: Vec<Vec<usize>> = (0..right.len()).map(grown).collect();
        shapes.push(right.iter().copied().chain([1]).collect());
        shapes.push(vec![right.iter().product(), 1, 1]);
        if right.len() == 2 && right[0] != right[1] {
            shapes.push(vec![right[1], right[0]]);
        }
        for shape in shapes {
            let mut tiny = whole.clone();
            replace(&mut tiny.tensors[i], DType::F32, &shape);
            for form in FORMS {
                let named = name(&tiny.tensors[i], form);
                // GGUF has no other statement of the vocabulary than the embedding, so the head is what differs.
                if form == Form::Gguf && named == "token_embd.weight" && shape[0] != right[0] {
                    assert_refused(&tiny, form, &["expected", "found"], &named);
                    continue;
                }
                assert_refused(&tiny, form, &[&named, &format!("{right:?}"), &format!("{shape:?}")], &named);
            }
        }
    }
}

#[test]
fn types_that_cannot_be_multiplied_are_named() {
    let whole = Tiny::new(&WIDE);
    for i in 0..whole.tensors.len() {
        let shape = whole.tensors[i].shape.clone();
        for dtype in [DType::I32, DType::I8, DType::I64, DType::F64] {
            let mut tiny = whole.clone();
            replace(&mut tiny.tensors[i], dtype, &shape);
            for form in FORMS {
                let named = name(&tiny.tensors[i], form);
                assert_refused(&tiny, form, &[&named, dtype.name(), "expected", "F32"], &named);
            }
        }
        // What only safetensors can hold: an FP8 checkpoint, say.
        for dtype in [DType::F8_E4M3, DType::U8, DType::Bool] {
            let mut tiny = whole.clone();
            replace(&mut tiny.tensors[i], dtype, &shape);
            let named = name(&tiny.tensors[i], Form::Checkpoint);
            assert_refused(&tiny, Form::Checkpoint, &[&named, dtype.name(), "expected"], &named);
        }
        if shape == [256] {
            for dtype in [DType::Q8_0, DType::Q4_K] {
                let mut tiny = whole.clone();
                replace(&mut tiny.tensors[i], dtype, &shape);
                let named = name(&tiny.tensors[i], Form::Gguf);
                assert_refused(&tiny, Form::Gguf, &[&named, dtype.name(), "F32, F16 or BF16"], "a quantised norm");
            }
        }
    }
}

/// Rows of 32 values cannot be Q4_K. The writer refuses to write them, so the type's number is changed in the file.
#[test]
fn rows_that_are_no_whole_block_are_refused() {
    let mut tiny = Tiny::new(&SMALL);
    // 40 rows of 32 values as Q8_0.
    let shape = tiny.tensors[0].shape.clone();
    replace(&mut tiny.tensors[0], DType::Q8_0, &shape);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    tiny.write_gguf(&path);
    assert_eq!(crate::refusal::refused(&path), Ok(()));
    let mut bytes = std::fs::read(&path).unwrap();
    let name = b"token_embd.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    // Number of axes in 4 bytes, two axes in 8 each, then the type: 8 is Q8_0, 12 is Q4_K.
    let type_at = at + 4 + 16;
    assert_eq!(bytes[type_at..type_at + 4], 8u32.to_le_bytes());
    bytes[type_at] = 12;
    std::fs::write(&path, bytes).unwrap();
    let message = crate::refusal::refused(&path).unwrap_err();
    for part in ["token_embd.weight", "Q4_K", "32", "256", "m.gguf"] {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn tensors_of_nobody_are_counted_and_named() {
    for form in FORMS {
        let mut tiny = Tiny::new(&SMALL);
        for extra in ["vision.patch.weight", "score.weight"] {
            let mut tensor = tiny.tensors[0].clone();
            (tensor.hugging_face, tensor.gguf) = (extra.to_owned(), extra.to_owned());
            tiny.tensors.push(tensor);
        }
        let count = "2 tensors belong to no part of a qwen3 model";
        assert_refused(&tiny, form, &[count, "wrong answers"], "two tensors of nobody");
        // Biases of Qwen2 in a Qwen3 file, and a layer more than the configuration has.
        for (hugging_face, gguf) in [
            ("model.layers.1.self_attn.q_proj.bias", "blk.1.attn_q.bias"),
            ("model.layers.2.input_layernorm.weight", "blk.2.attn_norm.weight"),
        ] {
            let mut tiny = Tiny::new(&SMALL);
            let mut tensor = tiny.tensors[1].clone();
            (tensor.hugging_face, tensor.gguf) = (hugging_face.to_owned(), gguf.to_owned());
            tiny.tensors.push(tensor);
            let named = name(tiny.tensors.last().unwrap(), form);
            assert_refused(&tiny, form, &[&named, "1 tensor"], &named);
        }
    }
}

#[test]
fn numbers_that_contradict_the_tensors_are_refused() {
    for (key, value) in [
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 2),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 1),
        ("num_key_value_heads", 4),
        ("head_dim", 8),
        ("head_dim", 32),
        ("hidden_size", 16),
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 20),
        ("vocab_size", 39),
        ("vocab_size", 1 << 20),
    ] {
        let mut tiny = Tiny::new(&SMALL);
        tiny.config.insert(key.into(), json!(value));
        assert_refused(&tiny, Form::Checkpoint, &["tensor"], &format!("{key} = {value}"));
    }
    let mut tiny = Tiny::new(&SMALL);
    tiny.config.insert("model_type".into(), json!("qwen2"));
    assert_refused(&tiny, Form::Checkpoint, &["q_proj.bias", "missing", "qwen2"], "qwen3's tensors as qwen2");
}

/// How many tensors are missing, which are the first, and what is there instead.
#[test]
fn what_is_missing_is_counted_and_the_nearest_is_named() {
    let as_qwen2 = |form| {
        let mut tiny = Tiny::new(&SMALL);
        tiny.config.insert("model_type".into(), json!("qwen2"));
        for (key, value) in &mut tiny.metadata {
            *key = key.replace("qwen3", "qwen2");
            if key == "general.architecture" {
                *value = "qwen2".into();
            }
        }
        (tiny, form)
    };
    for (form, missing, there) in [
        (Form::Checkpoint, "`model.layers.0.self_attn.q_proj.bias` [64]", "`model.layers.0.self_attn.q_norm.weight`"),
        (Form::Gguf, "`blk.0.attn_q.bias` [64]", "`blk.0.attn_q_norm.weight`"),
    ] {
        let others = missing.replace("q_proj", "k_proj").replace("attn_q", "attn_k").replace(" [64]", "");
        let told = [
            "read as qwen2".to_owned(),
            format!("tensor {missing} is missing, and so are 5 others ({others}, "),
            format!(", ...); it has {there}, as qwen3 models have"),
            "hint: the weights are not those that the configuration describes".to_owned(),
        ];
        let (tiny, form) = as_qwen2(form);
        assert_refused(&tiny, form, &told.each_ref().map(String::as_str), "qwen3's tensors as qwen2");
        // The other way round, and with a tensor too many.
        let mut qwen2 = Tiny::new(&Shape { architecture: "qwen2", ..SMALL });
        qwen2.tensors.push(Tiny::new(&SMALL).tensors[6].clone());
        let named = name(&qwen2.tensors[qwen2.tensors.len() - 1], form);
        assert_refused(&qwen2, form, &[&named, "wrong answers", "hint: "], "qwen2 with a norm of qwen3's");
    }
    // Renamed as quantisers do.
    let mut tiny = Tiny::new(&SMALL);
    for tensor in &mut tiny.tensors {
        for name in [&mut tensor.hugging_face, &mut tensor.gguf] {
            *name = name.replace("up_proj.weight", "up_proj.qweight").replace("ffn_up.weight", "ffn_up.qweight");
        }
    }
    for (form, near) in [(Form::Checkpoint, "model.layers.0.mlp.up_proj"), (Form::Gguf, "blk.0.ffn_up")] {
        let told =
            ["and so is 1 other (", &format!("the nearest that is there is `{near}.qweight`"), "hint: take the model"];
        assert_refused(&tiny, form, &told, "a renamed matrix");
    }
    // Cut short.
    let mut tiny = Tiny::new(&SMALL);
    tiny.tensors.truncate(20);
    for form in FORMS {
        let told = ["what is there belongs to the model", "hint: the file is not whole; fetch it or write it again"];
        assert_refused(&tiny, form, &told, "a model cut short");
    }
}

/// Adapters in checkpoint form lack what a model has, and are told so.
#[test]
fn checkpoints_of_other_kinds_are_refused() {
    let mut adapter = Tiny::new(&SMALL);
    for tensor in &mut adapter.tensors {
        tensor.hugging_face = format!("base_model.model.{}.lora_A.weight", tensor.hugging_face);
    }
    assert_refused(&adapter, Form::Checkpoint, &["model.embed_tokens.weight", "missing"], "an adapter");
}

/// Embedding models are saved as a body alone; they load, and say that they have no head.
#[test]
fn a_body_alone_is_an_embedding_model() {
    let mut embedding = Tiny::new(&SMALL);
    for tensor in &mut embedding.tensors {
        tensor.hugging_face = tensor.hugging_face.trim_start_matches("model.").to_owned();
    }
    assert!(!planned(&embedding, Form::Checkpoint).headless, "a head is there");
    embedding.tensors.retain(|tensor| tensor.gguf != "output.weight");
    assert_eq!(outcome(&embedding, Form::Checkpoint), Ok(()));
    assert!(planned(&embedding, Form::Checkpoint).headless);
    // With the whole model's names a head that is missing is missed.
    let mut whole = Tiny::new(&SMALL);
    whole.tensors.retain(|tensor| tensor.gguf != "output.weight");
    assert_refused(&whole, Form::Checkpoint, &["`lm_head.weight`", "missing"], "a model without its head");
    // In GGUF files it is the way of pooling that tells them from models whose head is the embedding.
    let pooled = |pooling: u32| {
        let mut tiny = whole.clone();
        tiny.metadata.push(("qwen3.pooling_type".to_owned(), Value::U32(pooling)));
        tiny
    };
    for (pooling, headless) in [(0, false), (3, true)] {
        assert_eq!(planned(&pooled(pooling), Form::Gguf).headless, headless, "pooling {pooling}");
    }
    for (pooling, way) in [(1, "the mean of all positions"), (2, "the first position")] {
        let parts = [&format!("`qwen3.pooling_type` is {pooling}"), way, "expected 3, the last position"];
        assert_refused(&pooled(pooling), Form::Gguf, &parts, "vectors made another way");
    }
    // A reranker's head judges, and no embedding stands in for it.
    let parts =
        ["`qwen3.pooling_type` is 4", "neither `cls.output.weight` nor `output.weight`", "expected one of these"];
    assert_refused(&pooled(4), Form::Gguf, &parts, "a reranker without its head");
}

/// Models that were made of Qwen's, to be read otherwise, would give vectors that mean nothing.
#[test]
fn models_whose_positions_see_ahead_are_refused() {
    let mut tiny = Tiny::new(&SMALL);
    tiny.metadata.push(("qwen3.attention.causal".to_owned(), Value::Bool(false)));
    assert_refused(
        &tiny,
        Form::Gguf,
        &["`qwen3.attention.causal` is false", "expected true"],
        "positions that see ahead",
    );
    let mut tiny = Tiny::new(&SMALL);
    tiny.config.insert("is_causal".to_owned(), json!(false));
    assert_refused(&tiny, Form::Checkpoint, &["`is_causal` is false", "expected true"], "positions that see ahead");
    let folder = tempfile::tempdir().unwrap();
    Tiny::new(&SMALL).write_checkpoint(folder.path());
    let pooling = folder.path().join("1_Pooling");
    std::fs::create_dir(&pooling).unwrap();
    for (way, is_right) in [("pooling_mode_lasttoken", true), ("pooling_mode_mean_tokens", false)] {
        std::fs::write(pooling.join("config.json"), json!({ way: true, "word_embedding_dimension": 8 }).to_string())
            .unwrap();
        let opened = qwenkit_formats::ModelFiles::open(folder.path()).map(|files| qwenkit_models::arch::plan(&files));
        match opened.unwrap() {
            Ok(_) => assert!(is_right),
            Err(refusal) => {
                assert!(!is_right && refusal.to_string().contains("`pooling_mode_mean_tokens` is true"), "{refusal}")
            }
        }
    }
}

/// Published rerankers whose head is the embedding are read without a head of their own; the larger one has one.
#[test]
fn rerankers_that_are_tied_are_told_by_their_size() {
    for (layers, hidden_size, is_tied) in [(28, 1024, true), (36, 2560, true), (36, 4096, false), (28, 2560, false)] {
        // Metadata and names are enough: no weights are read.
        let shape = Shape {
            layers,
            hidden_size,
            intermediate_size: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            vocab_size: 2,
            ..SMALL
        };
        let mut tiny = Tiny::new(&shape);
        tiny.tensors.retain(|tensor| tensor.gguf != "output.weight");
        tiny.metadata.push(("qwen3.pooling_type".to_owned(), Value::U32(4)));
        match is_tied {
            true => assert!(planned(&tiny, Form::Gguf).tied, "{layers} layers of {hidden_size}"),
            false => assert_refused(&tiny, Form::Gguf, &["`cls.output.weight`"], "a head of its own is missing"),
        }
    }
}

#[test]
fn the_nearest_right_thing_is_named() {
    let whole = Tiny::new(&SMALL);
    let at = |name: &str| whole.tensors.iter().position(|tensor| tensor.gguf == name).unwrap();
    let mut taller = whole.clone();
    replace(&mut taller.tensors[at("blk.1.ffn_up.weight")], DType::F32, &[64, 32]);
    let parts = ["the nearest that fits is a configuration with 64 in place of 48, which is its `intermediate_size`"];
    let mut turned = whole.clone();
    replace(&mut turned.tensors[at("blk.1.ffn_up.weight")], DType::F32, &[32, 48]);
    let mut extra = whole.clone();
    let mut more = whole.tensors[at("blk.1.ffn_up.weight")].clone();
    (more.gguf, more.hugging_face) = ("blk.1.ffn_up.scale".into(), "model.layers.1.mlp.up_proj.scale".into());
    extra.tensors.push(more);
    for form in FORMS {
        assert_refused(&taller, form, &parts, "another width");
        assert_refused(&turned, form, &["the nearest is its transpose"], "a transposed matrix");
        let named = name(&whole.tensors[at("blk.1.ffn_up.weight")], form);
        let nearest = format!("the nearest that belongs to it is `{named}`");
        assert_refused(&extra, form, &["1 tensors belong to no part", &nearest], "an extra tensor");
    }
}
