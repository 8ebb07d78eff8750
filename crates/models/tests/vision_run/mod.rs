//! Runs models with their towers without an engine, and writes mmproj files again with something changed.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use qwenkit_formats::{
    Gguf, ModelFiles,
    gguf::{Metadata, TensorSpec, Writer},
    read_safetensors_file,
};
use qwenkit_kernels::{Compute, PAGE_TOKENS};
use qwenkit_models::{
    Batch, BatchSeq, Buffers, Grid, Model, ModelState, Outputs, Pixels, Positions, Seen, SeenRows, Span, Tower,
    TowerBuffers,
};
use qwenkit_tensor::{DType, TokenId};

use crate::moe_run::{Tensor, assert_same_bits, compute, fixture, tensors};

/// What transformers says of a text with images.
pub(crate) struct Record {
    pub(crate) input_ids: Vec<TokenId>,
    /// (T, V)
    pub(crate) logits: Vec<f32>,
    pub(crate) greedy_ids: Vec<TokenId>,
    pub(crate) images: Vec<Image>,
    /// Of films, seconds from step to step.
    seconds_per_step: f32,
}

pub(crate) struct Image {
    pub(crate) pixels: Pixels,
    is_film: bool,
}

/// `NAME.safetensors` of a fixture.
pub(crate) fn record(fixture_name: &str, name: &str) -> Record {
    let file = read_safetensors_file(&fixture(fixture_name).join(format!("{name}.safetensors"))).unwrap();
    let bytes = |name: &str| {
        let info = file.tensor(name)?;
        let mut bytes = vec![0; info.len_bytes];
        file.read(info, 0, &mut bytes).unwrap();
        Some(bytes)
    };
    let numbers = |name: &str| -> Vec<usize> {
        bytes(name)
            .iter()
            .flatten()
            .copied()
            .collect::<Vec<u8>>()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as usize)
            .collect()
    };
    let floats = |name: &str| -> Vec<f32> {
        bytes(name)
            .iter()
            .flatten()
            .copied()
            .collect::<Vec<u8>>()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    };
    let ids = |name: &str| numbers(name).into_iter().map(|id| TokenId(id as u32)).collect();
    let mut images = Vec::new();
    for (values, grids, is_film) in
        [("pixel_values", "image_grid_thw", false), ("pixel_values_videos", "video_grid_thw", true)]
    {
        let (values, grids) = (floats(values), numbers(grids));
        let patches: usize = grids.chunks_exact(3).map(|g| g[0] * g[1] * g[2]).sum();
        let mut rest = values.as_slice();
        for g in grids.chunks_exact(3) {
            let (own, more) = rest.split_at(g[0] * g[1] * g[2] * (values.len() / patches));
            rest = more;
            let pixels = Pixels { values: own.to_vec(), grid: Grid { steps: g[0], rows: g[1], cols: g[2] } };
            images.push(Image { pixels, is_film });
        }
    }
    Record {
        input_ids: ids("input_ids"),
        logits: floats("logits"),
        greedy_ids: ids("greedy_ids"),
        images,
        seconds_per_step: floats("second_per_grid_ts").first().copied().unwrap_or(1.0),
    }
}

/// A model with its tower.
pub(crate) struct Sighted {
    pub(crate) model: Model,
    pub(crate) tower: Tower,
    pub(crate) compute: Compute,
}

/// A text's images, looked at.
struct View {
    positions: Positions,
    vectors: Vec<(Span, Vec<f32>)>,
}

impl Sighted {
    pub(crate) fn open(path: &Path, mmproj: Option<&Path>) -> Sighted {
        Sighted::open_with(path, mmproj, compute())
    }

    pub(crate) fn open_with(path: &Path, mmproj: Option<&Path>, compute: Compute) -> Sighted {
        let files = ModelFiles::open(path).unwrap();
        let mmproj = mmproj.map(|path| ModelFiles::open(path).unwrap());
        let model = Model::load(&files, &compute, &mut |_| {}).unwrap();
        let mut last = None;
        let progress = &mut |event: qwenkit_models::LoadEvent| last = Some((event.done_bytes, event.total_bytes));
        let tower = Tower::load(&files, mmproj.as_ref(), model.plan(), &compute, progress).unwrap();
        assert!(last.is_some_and(|(done, total)| done == total), "progress comes to its end: {last:?}");
        Sighted { model, tower, compute }
    }

    pub(crate) fn look(&self, pixels: &Pixels) -> Vec<f32> {
        self.tower.encode(&self.compute, &mut TowerBuffers::default(), pixels).unwrap()
    }

    /// Images take the runs of image tokens in turn, films those of video tokens; of some models a run for each step.
    fn view(&self, record: &Record) -> View {
        let (sight, plan) = (self.model.plan().sight.as_ref().unwrap(), self.tower.plan());
        let mut images = Vec::new();
        for image in &record.images {
            let (vectors, grid) = (self.look(&image.pixels), image.pixels.grid.merged(&plan.patch));
            let token = if image.is_film { sight.video_token } else { sight.image_token };
            let interval = match plan.positions_per_second {
                Some(per_second) if image.is_film => per_second * record.seconds_per_step,
                _ => 1.0,
            };
            let steps = if plan.films_by_step { grid.steps } else { 1 };
            let piece = vectors.len() / steps;
            for vectors in vectors.chunks_exact(piece) {
                let grid = Grid { steps: grid.steps / steps, ..grid };
                images.push((token, grid, interval, vectors.to_vec()));
            }
        }
        let (mut at, mut vectors) = (0, Vec::new());
        let is_placeholder = |id: &TokenId| *id == sight.image_token || *id == sight.video_token;
        while let Some(start) = (at..record.input_ids.len()).find(|&i| is_placeholder(&record.input_ids[i])) {
            let next = images.iter().position(|(token, ..)| *token == record.input_ids[start]).unwrap();
            let (_, grid, interval, values) = images.remove(next);
            at = start + grid.steps * grid.rows * grid.cols;
            vectors.push((Span { tokens: start..at, grid, interval }, values));
        }
        assert!(images.is_empty());
        let spans: Vec<Span> = vectors.iter().map(|(span, _)| span.clone()).collect();
        View { positions: Positions::new(record.input_ids.len(), &spans), vectors }
    }

    /// Logits (T, V) of the record's text, in pieces that end at `cuts` and at the end.
    pub(crate) fn logits(&self, record: &Record, cuts: &[usize]) -> Vec<f32> {
        let (view, ids) = (self.view(record), &record.input_ids);
        let mut run = Run::new(self, 2, 1);
        let (mut all, mut start) = (Vec::new(), 0);
        for &end in cuts.iter().chain([&ids.len()]) {
            all.extend(run.feed(&[(&ids[start..end], start, &[1, 0], 0, Some(&view))]));
            start = end;
        }
        all
    }

    /// As many most probable tokens after the text as are on record, each through the cache.
    pub(crate) fn greedy(&self, record: &Record) -> Vec<TokenId> {
        let (view, vocab) = (self.view(record), self.model.plan().vocab);
        let (mut input, mut position, mut found) = (record.input_ids.clone(), 0, Vec::new());
        let count = (input.len() + record.greedy_ids.len()).div_ceil(PAGE_TOKENS);
        let pages: Vec<u32> = (0..count as u32).collect();
        let mut run = Run::new(self, pages.len(), 1);
        while found.len() < record.greedy_ids.len() {
            let logits = run.feed(&[(&input, position, &pages, 0, Some(&view))]);
            position += input.len();
            let last = &logits[logits.len() - vocab..];
            let best = (0..vocab).rev().max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            input = vec![TokenId(best as u32)];
            found.extend(&input);
        }
        found
    }

    /// The record's text in two pieces, the second beside text and beside the same again, has the bits of `alone`.
    pub(crate) fn assert_batch_as_alone(&self, record: &Record, alone: &[f32], what: &str) {
        let (view, ids, vocab) = (self.view(record), &record.input_ids[..], self.model.plan().vocab);
        for cut in [2, 7, 25] {
            let mut run = Run::new(self, 4, 3);
            let start = run.feed(&[(&ids[..cut], 0, &[3], 2, Some(&view))]);
            let text = (&ids[..3], 0, &[1][..], 0, None);
            let rest = run.feed(&[text, (&ids[cut..], cut, &[3], 2, Some(&view)), (ids, 0, &[0], 1, Some(&view))]);
            let (first, second) = (3 * vocab, (3 + ids.len() - cut) * vocab);
            assert_same_bits(&start, &alone[..start.len()], &format!("{what}: start, cut at {cut}"));
            assert_same_bits(&rest[first..second], &alone[start.len()..], &format!("{what}: rest, cut at {cut}"));
            assert_same_bits(&rest[second..], alone, &format!("{what}: the same beside it"));
        }
    }
}

/// Part of a sequence: its tokens, the position of the first, the sequence's pages, its slot, its images.
type Part<'a> = (&'a [TokenId], usize, &'a [u32], usize, Option<&'a View>);

struct Run<'a> {
    seeing: &'a Sighted,
    state: ModelState,
    buffers: Buffers,
}

impl<'a> Run<'a> {
    fn new(seeing: &'a Sighted, pages: usize, slots: usize) -> Run<'a> {
        let state = ModelState::new(seeing.model.plan(), seeing.model.kv_type(), pages, slots).unwrap();
        Run { seeing, state, buffers: Buffers::default() }
    }

    /// Logits (T, V) of one batch.
    fn feed(&mut self, parts: &[Part<'_>]) -> Vec<f32> {
        let rows_of = |view: &View, range: std::ops::Range<usize>| -> Vec<(std::ops::Range<usize>, Vec<f32>)> {
            let mut found = Vec::new();
            for (span, values) in &view.vectors {
                let each = values.len() / span.tokens.len();
                let (start, end) = (span.tokens.start.max(range.start), span.tokens.end.min(range.end));
                if start < end {
                    let own = values[(start - span.tokens.start) * each..(end - span.tokens.start) * each].to_vec();
                    found.push((start - range.start..end - range.start, own));
                }
            }
            found
        };
        let looked: Vec<_> = parts
            .iter()
            .map(|(ids, first, _, _, view)| {
                let range = *first..first + ids.len();
                let positions = |view: &View| range.clone().map(|i| view.positions.at(i)).collect::<Vec<_>>();
                view.map(|view| (positions(view), rows_of(view, range.clone())))
            })
            .collect();
        let rows: Vec<Vec<SeenRows<'_>>> = looked
            .iter()
            .map(|looked| {
                let rows = looked.iter().flat_map(|(_, rows)| rows);
                rows.map(|(rows, values)| SeenRows { rows: rows.clone(), values }).collect()
            })
            .collect();
        let seen: Vec<Option<Seen<'_>>> = looked
            .iter()
            .zip(&rows)
            .map(|(looked, rows)| looked.as_ref().map(|(positions, _)| Seen { positions, rows }))
            .collect();
        let (mut tokens, mut seqs, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for (&(ids, first, pages, slot, _), seen) in parts.iter().zip(&seen) {
            let rows = tokens.len()..tokens.len() + ids.len();
            tokens.extend_from_slice(ids);
            seqs.push(BatchSeq {
                rows,
                first,
                pages,
                slot,
                outputs: Outputs::All,
                seen: seen.as_ref(),
                adapter: None,
                best: None,
            });
        }
        let batch = Batch { tokens: &tokens, seqs: &seqs };
        let Sighted { model, compute, .. } = self.seeing;
        model.forward(compute, &mut self.state, &batch, &mut self.buffers, None, &mut logits);
        logits
    }
}

/// Refuses two lists that differ by more than `limit` anywhere.
pub(crate) fn assert_near(found: &[f32], expected: &[f32], limit: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0, |worst: f32, d| if d.is_nan() { f32::INFINITY } else { worst.max(d) });
    println!("{what}: largest difference {worst:.2e}");
    assert!(worst <= limit, "{what}: largest difference {worst:.2e}, at most {limit:.0e} allowed");
}

/// The fixture's mmproj file with its metadata and its tensors changed.
pub(crate) fn mmproj(
    fixture_name: &str,
    change: impl FnOnce(&mut Metadata),
    alter: impl FnOnce(&mut Vec<Tensor>),
) -> (tempfile::TempDir, PathBuf) {
    let original = fixture(fixture_name).join("mmproj.gguf");
    let mut all = tensors(&original);
    alter(&mut all);
    let mut metadata = Gguf::open(&original).unwrap().metadata().clone();
    change(&mut metadata);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mmproj.gguf");
    let spec = |t: &Tensor| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() };
    let mut writer = Writer::create(&path, &metadata, &all.iter().map(spec).collect::<Vec<_>>()).unwrap();
    for tensor in &all {
        writer.write(&tensor.name, &tensor.bytes).unwrap();
    }
    writer.finish().unwrap();
    (dir, path)
}

/// An f32 tensor in another type.
pub(crate) fn convert(tensor: &mut Tensor, dtype: DType) {
    let values: Vec<f32> = tensor.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    tensor.bytes = match dtype {
        DType::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        _ => crate::moe_run::q8_0(&tensor.bytes),
    };
    tensor.dtype = dtype;
}

/// (E, N, K) of f32 as (E, K, N).
pub(crate) fn turn(tensor: &mut Tensor) {
    let [experts, rows, cols] = tensor.shape[..] else { panic!("{:?}", tensor.shape) };
    let value = |e: usize, r: usize, c: usize| &tensor.bytes[((e * rows + r) * cols + c) * 4..][..4];
    let mut bytes = Vec::with_capacity(tensor.bytes.len());
    for e in 0..experts {
        for c in 0..cols {
            (0..rows).for_each(|r| bytes.extend_from_slice(value(e, r, c)));
        }
    }
    (tensor.bytes, tensor.shape) = (bytes, vec![experts, cols, rows]);
}

/// A tensor of a Qwen3-VL mixture's checkpoint as a converter that takes packed experts for transposed ones writes it to GGUF.
pub(crate) fn as_turned_gguf(mut tensor: Tensor) -> Vec<Tensor> {
    if let Some(rest) = tensor.name.clone().strip_prefix("model.language_model.layers.") {
        let (layer, part) = rest.split_once('.').unwrap();
        let named = |own: &str| format!("blk.{layer}.{own}.weight");
        if part == "mlp.experts.gate_up_proj" {
            turn(&mut tensor);
            let half = tensor.shape[1] / 2 * tensor.shape[2] * 4;
            let of = |side: usize| tensor.bytes.chunks_exact(half).skip(side).step_by(2).flatten().copied().collect();
            let shape = vec![tensor.shape[0], tensor.shape[1] / 2, tensor.shape[2]];
            let made =
                |name: &str, bytes| Tensor { name: named(name), dtype: tensor.dtype, shape: shape.clone(), bytes };
            return vec![made("ffn_gate_exps", of(0)), made("ffn_up_exps", of(1))];
        }
        if part == "mlp.experts.down_proj" {
            turn(&mut tensor);
            tensor.name = named("ffn_down_exps");
            return vec![tensor];
        }
        let own = match part {
            "input_layernorm.weight" => "attn_norm",
            "post_attention_layernorm.weight" => "ffn_norm",
            "self_attn.q_proj.weight" => "attn_q",
            "self_attn.k_proj.weight" => "attn_k",
            "self_attn.v_proj.weight" => "attn_v",
            "self_attn.o_proj.weight" => "attn_output",
            "self_attn.q_norm.weight" => "attn_q_norm",
            "self_attn.k_norm.weight" => "attn_k_norm",
            "mlp.gate.weight" => "ffn_gate_inp",
            other => panic!("{other}"),
        };
        tensor.name = named(own);
    } else {
        let own = match tensor.name.as_str() {
            "lm_head.weight" => "output.weight",
            "model.language_model.embed_tokens.weight" => "token_embd.weight",
            "model.language_model.norm.weight" => "output_norm.weight",
            other => panic!("{other}"),
        };
        tensor.name = own.to_owned();
    }
    vec![tensor]
}
