//! How much errors in each column of a matrix count: the mean square of what the column is multiplied with while the model
//! reads a text (an importance matrix).

use std::collections::HashMap;
use std::path::Path;

use qwenkit_engine::text_of;
use qwenkit_formats::{Gguf, ModelFiles, TensorInfo};
use qwenkit_kernels::{Compute, HeadOrder, PAGE_TOKENS};
use qwenkit_models::{Batch, BatchSeq, Buffers, Ffn, Mixer, Model, ModelState, Outputs, Plan, Site};
use qwenkit_tensor::{DType, TokenId};

use crate::{Error, metadata::unsayable, write::Importance};

/// Tokens that are read together, each lot from an empty context.
const LOT_TOKENS: usize = 512;

/// Sums of squares at one place.
#[derive(Default)]
struct Sums {
    squares: Vec<f64>,
    rows: usize,
}

/// Reads `text` with the model in `files`, and returns the importance of columns by GGUF name.
///
/// # Errors
/// When the model is not whole, or the text has no tokens.
pub fn calibrate(
    files: &ModelFiles,
    compute: &Compute,
    text: &str,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Importance, Error> {
    let ids = text_of(files)?
        .tokenizer
        .encode(text, qwenkit_text::SpecialTokens::AsText)
        .map_err(qwenkit_engine::Error::from)?;
    if ids.is_empty() {
        return Err(qwenkit_engine::Error::PromptEmpty.into());
    }
    let model = Model::load(files, compute, &mut |_| {})?;
    let plan = model.plan();
    let mut sums: HashMap<(Site, usize), Sums> = HashMap::new();
    let lot = LOT_TOKENS.min(plan.context_tokens);
    let (mut done, total) = (0, ids.len() as u64);
    for ids in ids.chunks(lot) {
        read(&model, compute, ids, &mut sums)?;
        done += ids.len() as u64;
        progress(done, total);
    }
    Ok(by_name(plan, &sums))
}

fn read(
    model: &Model,
    compute: &Compute,
    ids: &[TokenId],
    sums: &mut HashMap<(Site, usize), Sums>,
) -> Result<(), Error> {
    let pages: Vec<u32> = (0..ids.len().div_ceil(PAGE_TOKENS) as u32).collect();
    let mut state =
        ModelState::new(model.plan(), model.kv_type(), pages.len(), 1).map_err(qwenkit_models::Error::from)?;
    let seq = BatchSeq {
        rows: 0..ids.len(),
        first: 0,
        pages: &pages,
        slot: 0,
        outputs: Outputs::All,
        seen: None,
        adapter: None,
        best: None,
    };
    let rows = ids.len();
    let mut tap = |site: Site, layer: usize, x: &mut [f32]| {
        let wanted =
            matches!(site, Site::MixerInput | Site::Heads | Site::FfnInput | Site::FfnHidden | Site::HeadInput);
        if !wanted {
            return;
        }
        let width = x.len() / rows;
        let sums = sums.entry((site, layer)).or_default();
        sums.squares.resize(width, 0.0);
        sums.rows += rows;
        for row in x.chunks_exact(width) {
            sums.squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
        }
    };
    let (batch, mut logits) = (Batch { tokens: ids, seqs: &[seq] }, Vec::new());
    model.forward(compute, &mut state, &batch, &mut Buffers::default(), Some(&mut tap), &mut logits);
    Ok(())
}

/// The importance of columns in an importance matrix that llama.cpp has written as GGUF.
///
/// # Errors
/// When the file is none, or its sums and counts do not belong together.
pub fn read_importance(path: &Path) -> Result<Importance, Error> {
    const SUMS: &str = ".in_sum2";
    let gguf = Gguf::open(path)?;
    if gguf.metadata().string("general.type")? != Some("imatrix") {
        let found = gguf.metadata().string("general.type")?.unwrap_or("of no stated type").to_owned();
        return Err(unsayable(
            path,
            "the file",
            found,
            "an importance matrix (general.type `imatrix`), as llama-imatrix writes it",
        ));
    }
    let values = |info: &TensorInfo| {
        let mut bytes = vec![0; info.len_bytes];
        gguf.read(info, 0, &mut bytes)?;
        match info.dtype {
            DType::F32 => Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>()),
            other => Err(unsayable(path, &format!("the type of `{}`", info.name), other, "F32")),
        }
    };
    let mut all = Importance::new();
    for info in gguf.tensors() {
        let Some(name) = info.name.strip_suffix(SUMS) else { continue };
        let counts = gguf.tensor(&format!("{name}.counts"));
        let (sums, counts) = (values(info)?, counts.map(values).transpose()?.unwrap_or_default());
        if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
            let found = format!("{} sums and {} counts", sums.len(), counts.len());
            return Err(unsayable(path, &format!("`{name}`"), found, "a count for each matrix"));
        }
        // A matrix that no token went through has no say.
        let mean = |(sums, count): (&[f32], &f32)| -> Vec<f32> {
            sums.iter().map(|sum| if *count > 0.0 { sum / count } else { 1.0 }).collect()
        };
        let means = sums.chunks_exact((sums.len() / counts.len()).max(1)).zip(&counts).flat_map(mean);
        all.insert(name.to_owned(), means.collect());
    }
    Ok(all)
}

/// What each matrix is multiplied with.
fn by_name(plan: &Plan, sums: &HashMap<(Site, usize), Sums>) -> Importance {
    let mean = |site: Site, layer: usize| -> Option<Vec<f32>> {
        let Sums { squares, rows } = sums.get(&(site, layer))?;
        Some(squares.iter().map(|sum| (sum / *rows as f64) as f32).collect())
    };
    let mut all = Importance::new();
    let mut set = |layer: usize, names: &[&str], values: Option<&Vec<f32>>| {
        for name in names {
            if let Some(values) = values {
                all.insert(format!("blk.{layer}.{name}.weight"), values.clone());
            }
        }
    };
    for (i, layer) in plan.layers.iter().enumerate() {
        let (mixer_in, heads) = (mean(Site::MixerInput, i), mean(Site::Heads, i));
        match &layer.mixer {
            Mixer::Attention(_) => {
                set(i, &["attn_q", "attn_k", "attn_v"], mixer_in.as_ref());
                set(i, &["attn_output"], heads.as_ref());
            }
            Mixer::DeltaNet(delta) => {
                set(i, &["attn_qkv", "attn_gate", "ssm_ba", "ssm_beta", "ssm_alpha"], mixer_in.as_ref());
                // Heads stand in another order in GGUF files.
                let shape = delta.shape;
                let in_turns = plan.architecture != "qwen3_next" && shape.order == HeadOrder::Grouped;
                let ordered = heads.map(|heads| {
                    let (keys, group) = (shape.key_heads, shape.value_heads / shape.key_heads);
                    let head = |j: usize| if in_turns { j % keys * group + j / keys } else { j };
                    let of = |j| heads[head(j) * shape.value_dim..][..shape.value_dim].iter().copied();
                    (0..shape.value_heads).flat_map(of).collect::<Vec<f32>>()
                });
                set(i, &["ssm_out"], ordered.as_ref());
            }
        }
        let (ffn_in, hidden) = (mean(Site::FfnInput, i), mean(Site::FfnHidden, i));
        match layer.ffn {
            Ffn::Dense { .. } => {
                set(i, &["ffn_gate", "ffn_up"], ffn_in.as_ref());
                set(i, &["ffn_down"], hidden.as_ref());
            }
            // What an expert reads is what all read; what it makes of it is not looked at.
            Ffn::Moe(moe) => {
                set(i, &["ffn_gate_shexp", "ffn_up_shexp"], ffn_in.as_ref());
                set(i, &["ffn_gate_exps", "ffn_up_exps"], ffn_in.as_ref());
                if moe.shared_width.is_some() {
                    set(i, &["ffn_down_shexp"], hidden.as_ref());
                }
            }
        }
    }
    if let Some(head) = mean(Site::HeadInput, 0) {
        all.insert("output.weight".into(), head.clone());
        // The embedding is looked up, except where it is the head too.
        if plan.tied {
            all.insert("token_embd.weight".into(), head);
        }
    }
    all
}
