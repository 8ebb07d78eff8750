//! Qwen4-exp: several residual streams, attention to chosen positions, embeddings of runs of tokens - the recorded answers,
//! the same bits however a batch is made up, and what is wrong with a file.

#[path = "moe_run/mod.rs"]
#[allow(dead_code)] // there is no GGUF record of this one
mod moe_run;

use moe_run::{
    Run, Tensor, assert_any_cut, assert_batch_as_alone, assert_hostile_numbers, assert_parity, assert_same_bits,
    assert_taken_back, checkpoint, compute, expected, fixture, logits, tensors, try_load,
};
use qwenkit_kernels::PAGE_TOKENS;
use qwenkit_models::{Mixer, Model, ModelState, StateNeed};
use qwenkit_tensor::{DType, TokenId};
use serde_json::json;

const NAME: &str = "qwen4-exp";

/// The record's sums are in another order, through more of them than in other models.
const LIMIT: f32 = 5e-3;

#[test]
fn recorded_answers() {
    assert_parity(&fixture(NAME), NAME, LIMIT);
}

#[test]
fn any_cut_of_the_prompt_gives_the_same_bits() {
    assert_any_cut(&fixture(NAME), NAME);
}

#[test]
fn a_sequence_in_a_batch_answers_as_alone() {
    assert_batch_as_alone(&fixture(NAME), NAME);
}

#[test]
fn hostile_numbers_are_refused_or_compute() {
    assert!(assert_hostile_numbers(NAME) > 100);
}

/// A prompt of several pages: blocks of the index end at their borders and before them.
fn long_prompt() -> Vec<TokenId> {
    (0..150).map(|i| TokenId(if i % 29 == 7 { 2 } else { i * 37 % 384 })).collect()
}

#[test]
fn a_long_prompt_in_pieces_gives_the_same_bits() {
    let compute = compute();
    let all = tensors(&fixture(NAME));
    // Blocks that fill pages, that lie across their borders, and that are longer than a page.
    for (block, budget) in [(4, 16), (3, 12), (5, 35), (70, 70)] {
        let change = |config: &mut serde_json::Value| {
            config["indexer_compress_ratio"] = json!(block);
            config["indexer_budget"] = json!(budget);
        };
        let folder = checkpoint(NAME, change, &all);
        let model = try_load(folder.path(), &compute).unwrap();
        let ids = long_prompt();
        let whole = logits(&model, &compute, &ids, &[]);
        for pieces in [vec![63], vec![64, 64], vec![1, 2, 3, 65], vec![149], vec![50; 2]] {
            let what = format!("blocks of {block}, pieces {pieces:?}");
            assert_same_bits(&logits(&model, &compute, &ids, &pieces), &whole, &what);
        }
    }
}

#[test]
fn a_choice_of_everything_is_ordinary_attention() {
    let (compute, ids) = (compute(), long_prompt());
    let all = tensors(&fixture(NAME));
    let of = |budget: usize| {
        let folder = checkpoint(NAME, |config| config["indexer_budget"] = json!(budget), &all);
        logits(&try_load(folder.path(), &compute).unwrap(), &compute, &ids, &[])
    };
    let (everything, more, few) = (of(148), of(400), of(16));
    assert_same_bits(&everything, &more, "as many blocks as there are");
    let vocab = 384;
    assert_same_bits(&few[..19 * vocab], &more[..19 * vocab], "tokens with few blocks before them");
    assert!(few[100 * vocab..] != more[100 * vocab..], "the others see less");
}

#[test]
fn a_sequence_goes_on_from_a_copied_state_and_page() {
    let (compute, ids) = (compute(), long_prompt());
    let model = try_load(&fixture(NAME), &compute).unwrap();
    let whole = logits(&model, &compute, &ids, &[]);
    // Positions in the middle of a page, of a block and of a run of tokens.
    for cut in [1, 5, 66, 71, 100] {
        let mut run = Run::new(&model, &compute, 6, 2);
        run.feed(&[(&ids[..cut], 0, &[0, 1], 0)]);
        run.copy_slot(0, 1);
        let (shared, partial) = (cut / PAGE_TOKENS, 4);
        run.copy_page(shared as u32, partial as u32);
        let mut pages = vec![0, 3, 5];
        pages[shared] = partial as u32;
        // The first goes another way, over the page that was copied.
        run.feed(&[(&ids[..30], cut, &[0, 1, 2], 0)]);
        let rest = run.feed(&[(&ids[cut..], cut, &pages, 1)]);
        assert_same_bits(&rest, &whole[cut * 384..], &format!("from position {cut}"));
    }
}

#[test]
fn a_sequence_goes_on_in_another_state_from_bytes() {
    let (compute, ids) = (compute(), long_prompt());
    let model = try_load(&fixture(NAME), &compute).unwrap();
    let whole = logits(&model, &compute, &ids, &[]);
    for cut in [5, 64, 128] {
        let mut run = Run::new(&model, &compute, 3, 1);
        run.feed(&[(&ids[..cut], 0, &[0, 1], 0)]);
        let (pages, slot) = ([run.state().page(0), run.state().page(1)], run.state().slot(0));
        assert_eq!(pages[0].len(), ModelState::page_bytes(model.plan(), model.kv_type()));
        assert_eq!(slot.len(), ModelState::slot_bytes(model.plan()));
        let mut later = Run::new(&model, &compute, 4, 2);
        assert!(pages.iter().zip([3, 1]).all(|(bytes, page)| later.state().put_page(page, bytes)));
        assert!(later.state().put_slot(1, &slot));
        let rest = later.feed(&[(&ids[cut..], cut, &[3, 1, 0], 1)]);
        assert_same_bits(&rest, &whole[cut * 384..], &format!("from position {cut}"));
        for (bytes, what) in [(&pages[0][1..], "a byte less"), (&[&pages[0][..], &[0]].concat()[..], "a byte more")] {
            assert!(!later.state().put_page(0, bytes), "a page of {what}");
        }
        assert!(!later.state().put_slot(0, &slot[1..]) && !later.state().put_slot(0, &[&slot[..], &[0]].concat()));
    }
}

#[test]
fn tokens_taken_back_leave_no_trace() {
    assert_taken_back(&fixture(NAME), NAME);
}

#[test]
fn the_plan_says_what_state_there_is() {
    let model = try_load(&fixture(NAME), &compute()).unwrap();
    let plan = model.plan();
    assert_eq!((plan.architecture, plan.stream_count()), ("qwen4_exp", 4));
    assert!(plan.has_recurrent_state());
    assert!(matches!(plan.layers[1].state()[..], [StateNeed::Recurrent(_), StateNeed::Ngrams { tokens: 2, .. }]));
    assert!(matches!(plan.layers[3].state()[..], [StateNeed::Paged { .. }, StateNeed::Index(_)]));
    // As other hybrids of this size, and in one layer 2 tokens and 9 columns of 4 streams of 64, f32; 7 more of each to go back.
    let recurrent = 3 * 4 * (4 * (32 * 32 + 8 * 32 + 16) + 2 * 8 * 32 + 10 * 256);
    assert_eq!(ModelState::slot_bytes(plan), recurrent + 9 * 4 + 16 * 4 * 64 * 4);
    // 64 positions of 2 heads of 64, keys and values, and an index key of 16, f32.
    assert_eq!(ModelState::page_bytes(plan, model.kv_type()), 64 * 4 * (2 * 2 * 64 + 16));
}

#[test]
fn published_files_call_the_chosen_attention_full() {
    let (compute, ids) = (compute(), expected(NAME).input_ids);
    let original = logits(&try_load(&fixture(NAME), &compute).unwrap(), &compute, &ids, &[]);
    let kinds = json!(["linear_attention", "linear_attention", "linear_attention", "full_attention"]);
    let folder = checkpoint(NAME, |config| config["layer_types"] = kinds, &tensors(&fixture(NAME)));
    let model = try_load(folder.path(), &compute).unwrap();
    assert!(matches!(&model.plan().layers[3].mixer, Mixer::Attention(a) if a.indexer.is_some()));
    assert_same_bits(&logits(&model, &compute, &ids, &[]), &original, "full_attention");
}

/// The table's parts in one tensor, and the constants left out.
#[test]
fn a_table_in_one_piece_and_computed_constants_are_the_same_model() {
    let (compute, ids) = (compute(), expected(NAME).input_ids);
    let original = logits(&try_load(&fixture(NAME), &compute).unwrap(), &compute, &ids, &[]);
    let mut all = tensors(&fixture(NAME));
    let is_part = |t: &Tensor| t.name.contains("ngram_embedding.shard_");
    let mut parts: Vec<Tensor> = all.iter().filter(|t| is_part(t)).cloned().collect();
    parts.sort_by(|a, b| a.name.cmp(&b.name));
    all.retain(|t| !is_part(t) && t.dtype != DType::I64);
    all.push(Tensor {
        name: "model.layers.1.ple.ple_embedding.ngram_embedding.weight".to_owned(),
        dtype: DType::F32,
        shape: vec![parts.iter().map(|p| p.shape[0]).sum(), 16],
        bytes: parts.iter().flat_map(|p| p.bytes.clone()).collect(),
    });
    let folder = checkpoint(NAME, |_| {}, &all);
    let model = try_load(folder.path(), &compute).unwrap();
    assert_same_bits(&logits(&model, &compute, &ids, &[]), &original, "one table");
}

#[test]
fn the_sigmoid_gate_of_published_files_computes_something_else() {
    let (compute, ids) = (compute(), expected(NAME).input_ids);
    let all = tensors(&fixture(NAME));
    let of = |gate: &str| {
        let folder = checkpoint(NAME, |config| config["output_gate_type"] = json!(gate), &all);
        logits(&try_load(folder.path(), &compute).unwrap(), &compute, &ids, &[])
    };
    assert!(of("silu") != of("sigmoid"));
}

#[test]
fn wrong_numbers_are_refused_by_name() {
    let all = tensors(&fixture(NAME));
    for (key, value, part) in [
        ("hc_count", json!(1), "`hc_count` is 1, expected 2 to"),
        ("hc_count", json!(null), "`hc_count` is absent"),
        ("hc_count", json!(3), "hc_norm.weight`: expected [192], found [256]"),
        ("hc_lowrank", json!(8), "input_mix_weight_down.weight`: expected [8, 256], found [16, 256]"),
        ("indexer_n_heads", json!(3), "index_qk_proj.weight`: expected [64, 64], found [48, 64]"),
        ("indexer_kv_heads", json!(2), "`indexer_kv_heads` is 2, expected 1 to 1"),
        ("indexer_head_dim", json!(8), "`indexer_head_dim` is 8, expected 16 or more"),
        ("indexer_budget", json!(17), "`indexer_budget` is 17, expected a multiple of the 4"),
        ("indexer_compress_ratio", json!(0), "`indexer_compress_ratio` is 0"),
        ("indexer_budget", json!(null), "`indexer_budget` is absent"),
        ("ple_layer_ids", json!([4]), "`ple_layer_ids` is 4, expected layers with linear attention, counted from 1"),
        ("ple_layer_ids", json!([0]), "`ple_layer_ids` is 0"),
        ("ple_layer_ids", json!([]), "tensors belong to no part of a qwen4_exp model"),
        ("ple_embed_dim", json!(66), "`ple_embed_dim` is 66, expected a multiple of the 4 tables"),
        ("ngram_size", json!(1), "`ngram_size` is 1, expected 1 to 256 tables"),
        ("ngram_vocab_size_base", json!(213), "ngram_heads_offsets` is [0, 211, 434, 661], expected [0, 223"),
        ("seed", json!(7), "layer_multipliers` is ["),
        ("eos_token_id", json!(null), "`eos_token_id` is absent"),
        ("output_gate_type", json!("relu"), "`output_gate_type` is `relu`, expected `swish` or `sigmoid`"),
        ("layer_types", json!(["linear_attention"]), "`layer_types` is 1 entries"),
    ] {
        let folder = checkpoint(NAME, |config| config[key] = value.clone(), &all);
        let message = try_load(folder.path(), &compute()).map(|_: Model| ()).unwrap_err().to_string();
        assert!(message.contains(part), "{key} = {value}: {message}");
    }
    let mut all = all;
    all.retain(|t| !t.name.contains("shard_3"));
    let folder = checkpoint(NAME, |_| {}, &all);
    let message = try_load(folder.path(), &compute()).map(|_: Model| ()).unwrap_err().to_string();
    assert!(message.contains("in 3 parts`: expected [896, 16], found [672, 16]"), "{message}");
}
