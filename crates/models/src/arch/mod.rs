//! The architectures: for each, one small file that turns a configuration into a `Plan`.
//!
//! To add one: a file here, its row in `ARCHITECTURES`, and whatever new block its plan asks for.

mod delta_net;
mod hyper;
mod layer_kinds;
mod mixture;
mod ngrams;
mod qwen;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_5;
mod qwen3_moe;
mod qwen3_next;
mod qwen4_exp;
mod reading;
mod rotary;
mod sight;
mod streams;

use std::path::Path;

use qwenkit_formats::{Gguf, ModelFiles};

use crate::{
    error::Error,
    missing,
    names::{JUDGE, MTP_OWN, Naming},
    plan::{LayerPlan, Mixer, Plan},
};
use hyper::Hyper;
pub(crate) use hyper::wrong;

/// One architecture: its names in both worlds, and how its numbers become a plan.
struct Architecture {
    /// `model_type` in config.json; the plan's name.
    model_type: &'static str,
    /// Other spellings of it: of the text part on its own.
    aliases: &'static [&'static str],
    /// `general.architecture` in a GGUF file.
    gguf: &'static str,
    /// Whether it is read from GGUF files alone.
    gguf_only: bool,
    /// Whether some layers have linear attention.
    is_hybrid: bool,
    /// Whether height and width take turns with time in the rotary pairs, where a file has sections.
    interleaved: bool,
    /// Vision towers that go with it.
    towers: &'static [&'static str],
    /// Whether the others look at chosen positions only.
    is_indexed: bool,
    plan: fn(&Hyper) -> Result<Plan, Error>,
}

const fn of(model_type: &'static str, gguf: &'static str, plan: fn(&Hyper) -> Result<Plan, Error>) -> Architecture {
    Architecture {
        model_type,
        aliases: &[],
        gguf,
        gguf_only: false,
        is_hybrid: false,
        is_indexed: false,
        interleaved: true,
        towers: &[],
        plan,
    }
}

/// The tower of Qwen3-VL, 3.5, 3.6 and 3.8, under the names that configs give it.
const QWEN3_TOWERS: &[&str] = &["qwen3_vl"];
/// GGUF files do not say which of the two they are; their tower's does.
const QWEN2_TOWERS: &[&str] = &["qwen2_vl", "qwen2_5_vl"];

const ARCHITECTURES: &[Architecture] = &[
    Architecture { gguf_only: true, ..of("qwen", "qwen", qwen::plan) },
    of("qwen2", "qwen2", qwen2::plan),
    of("qwen2_moe", "qwen2moe", qwen2_moe::plan),
    of("qwen3", "qwen3", qwen3::plan),
    of("qwen3_moe", "qwen3moe", qwen3_moe::plan),
    Architecture { is_hybrid: true, ..of("qwen3_next", "qwen3next", qwen3_next::plan) },
    Architecture {
        aliases: &["qwen3_5_text"],
        is_hybrid: true,
        towers: QWEN3_TOWERS,
        ..of("qwen3_5", "qwen35", qwen3_5::plan)
    },
    Architecture {
        aliases: &["qwen3_5_moe_text"],
        is_hybrid: true,
        towers: QWEN3_TOWERS,
        ..of("qwen3_5_moe", "qwen35moe", qwen3_5::plan_moe)
    },
    Architecture {
        aliases: &["qwen2_vl_text"],
        interleaved: false,
        towers: QWEN2_TOWERS,
        ..of("qwen2_vl", "qwen2vl", qwen2::plan)
    },
    // In GGUF files the row above stands for both.
    Architecture {
        aliases: &["qwen2_5_vl_text"],
        interleaved: false,
        towers: &["qwen2_5_vl"],
        ..of("qwen2_5_vl", "qwen2vl", qwen2::plan)
    },
    Architecture { aliases: &["qwen3_vl_text"], towers: QWEN3_TOWERS, ..of("qwen3_vl", "qwen3vl", qwen3::plan) },
    Architecture {
        aliases: &["qwen3_vl_moe_text"],
        towers: QWEN3_TOWERS,
        ..of("qwen3_vl_moe", "qwen3vlmoe", qwen3_moe::plan_vl)
    },
    Architecture {
        aliases: &["qwen4_exp_text"],
        is_hybrid: true,
        is_indexed: true,
        ..of("qwen4_exp", "qwen4exp", qwen4_exp::plan)
    },
];

/// The plan of the model in `files`.
///
/// # Errors
/// When the architecture is unknown, or its numbers are missing, wrong or contradict each other.
pub fn plan(files: &ModelFiles) -> Result<Plan, Error> {
    if let ModelFiles::Gguf(gguf) = files {
        refuse_companions(gguf)?;
    }
    let name = match files {
        ModelFiles::Gguf(gguf) => gguf.metadata().require_string("general.architecture")?,
        ModelFiles::Checkpoint(checkpoint) => checkpoint.config().require_string("model_type")?,
    };
    let is_gguf = matches!(files, ModelFiles::Gguf(_));
    let spelling = |a: &'static Architecture| if is_gguf { a.gguf } else { a.model_type };
    let is_alias = |a: &&Architecture| !is_gguf && a.aliases.contains(&name);
    let readable = || ARCHITECTURES.iter().filter(|a| is_gguf || !a.gguf_only);
    let Some(architecture) = readable().find(|a| spelling(a) == name || is_alias(a)) else {
        let mut names: Vec<_> = readable().map(spelling).collect();
        names.dedup();
        return Err(unknown(files.path(), name, &names));
    };
    let hyper = match files {
        ModelFiles::Gguf(gguf) => Hyper::from_gguf(architecture, gguf)?,
        ModelFiles::Checkpoint(checkpoint) => Hyper::from_config(architecture, checkpoint.config())?,
    };
    let mut plan = (architecture.plan)(&hyper)?;
    plan.sight = sight::read(architecture, files, &plan)?;
    (plan.headless, plan.judges) = missing_head(architecture, files, &plan)?;
    plan.mtp = mtp_layer(architecture, &plan).filter(|layer| mtp_fault(files, &plan, layer).is_none());
    plan.has_parts_beside = architecture.is_hybrid || !architecture.towers.is_empty();
    check_blocks(files, &plan)?;
    reading::check_reading(architecture, files)?;
    Ok(plan)
}

/// Refuses a GGUF file that counts its last layers among the blocks that guess, and a checkpoint that was saved as another family's.
fn check_blocks(files: &ModelFiles, plan: &Plan) -> Result<(), Error> {
    match files {
        ModelFiles::Gguf(gguf) => {
            let behind: Vec<String> = plan.spare_blocks().map(|i| format!("blk.{i}.")).collect();
            let is_behind = |name: &str| behind.iter().any(|block| name.starts_with(block.as_str()));
            let mut of_blocks =
                gguf.tensors().iter().map(|t| t.name.as_str()).filter(|name| is_behind(name)).peekable();
            if of_blocks.peek().is_some() && !of_blocks.any(|name| name.contains(".nextn.")) {
                let expected = "0, as no block of the file has `nextn` tensors: all are layers";
                return Err(wrong(gguf.path(), "nextn_predict_layers", plan.mtp_layers, expected));
            }
        }
        ModelFiles::Checkpoint(checkpoint) => {
            let config = checkpoint.config();
            let saved_as = config.strings("architectures")?.unwrap_or_default();
            if let Some(found) = saved_as.iter().find(|name| !name.to_ascii_lowercase().contains("qwen")) {
                let expected = format!("a class of Qwen, as `model_type` is {}", plan.architecture);
                return Err(wrong(config.path(), "architectures", format!("`{found}`"), &expected));
            }
        }
    }
    Ok(())
}

/// The block that guesses the token after the next, where an architecture is known to have one: attention as in the other layers that
/// have it, and the last layer's feed-forward block.
fn mtp_layer(architecture: &Architecture, plan: &Plan) -> Option<LayerPlan> {
    if !architecture.is_hybrid || architecture.is_indexed || plan.headless {
        return None;
    }
    let attention = plan.layers.iter().find(|layer| matches!(layer.mixer, Mixer::Attention(_)))?;
    let ffn = plan.layers.last()?.ffn.clone();
    Some(LayerPlan { ngrams: None, mixer: attention.mixer.clone(), ffn })
}

/// Why the block that guesses the token after the next is not in the plan of `files` although they hold parts of one: what is found,
/// in words. None where there is no such part, or the block is whole.
pub fn mtp_gap(files: &ModelFiles, plan: &Plan) -> Option<String> {
    let architecture = ARCHITECTURES.iter().find(|a| a.model_type == plan.architecture)?;
    let (naming, layers) = (Naming::of_files(files), plan.layers.len());
    // Of the block's own parts, and of the layer in it.
    let starts = match naming {
        Naming::HuggingFace { .. } => vec![naming.mtp(layers, ("", ""))],
        Naming::Gguf => plan.spare_blocks().map(|i| naming.inner(i, ("", ""))).collect(),
    };
    let is_part = |name: &str| starts.iter().any(|start| name.starts_with(start.as_str()));
    let part = files.tensors().iter().find(|tensor| is_part(&tensor.name)).filter(|_| !plan.headless)?;
    match mtp_layer(architecture, plan) {
        Some(layer) => mtp_fault(files, plan, &layer),
        None => Some(format!("one that this version does not compute, with `{}`,", part.name)),
    }
}

/// What keeps the block `layer` of `files` from being used, in words. Configs of some generations do not speak of it, so its tensors
/// tell.
fn mtp_fault(files: &ModelFiles, plan: &Plan, layer: &LayerPlan) -> Option<String> {
    let naming = Naming::of_files(files);
    let has = |name: &str| files.tensor(name).is_some();
    // One with an embedding or a head of its own would guess from the wrong ones.
    if let Some(own) = MTP_OWN.map(|pair| naming.mtp(plan.layers.len(), pair)).into_iter().find(|name| has(name)) {
        return Some(format!("one that this version does not compute, with `{own}`,"));
    }
    missing::lacking_in_block(plan, naming, layer, &has).map(|lacking| format!("one that lacks {lacking}"))
}

/// Whether the files hold everything but an output head, and whether they have its rows of yes and no instead.
fn missing_head(architecture: &Architecture, files: &ModelFiles, plan: &Plan) -> Result<(bool, bool), Error> {
    let ModelFiles::Gguf(gguf) = files else {
        // The body of a model saved by itself.
        let is_body = files.tensor("embed_tokens.weight").is_some();
        return Ok((is_body && files.tensor("lm_head.weight").is_none(), false));
    };
    if gguf.tensor("output.weight").is_some() {
        return Ok((false, false));
    }
    let key = |name: &str| format!("{}.{name}", architecture.gguf);
    if gguf.tensor(JUDGE).is_some() {
        let name = key("classifier.output_labels");
        let labels = gguf.metadata().strings(&name)?.map(|labels| labels.iter().collect::<Vec<_>>());
        return match labels {
            Some(labels) if labels != ["yes", "no"] => {
                Err(wrong(gguf.path(), &name, format!("{labels:?}"), "yes and no"))
            }
            _ => Ok((true, true)),
        };
    }
    // How states become one vector; the ways before the third are refused elsewhere. The fourth is a reranker's, whose head judges.
    let name = key("pooling_type");
    let pooling = gguf.metadata().usize(&name)?;
    if pooling == Some(4) && !is_tied_reranker(architecture, plan) {
        let found = format!("4, a reranker's, in a file with neither `{JUDGE}` nor `output.weight`");
        let expected = "one of these tensors, as the head of this model is not its embedding (of Qwen3-Reranker 0.6B and 4B \
                        have it so, of Qwen3-VL-Reranker 2B); fetch the file again, or convert the model again";
        return Err(wrong(gguf.path(), &name, found, expected));
    }
    Ok((matches!(pooling, Some(1..=3)), false))
}

/// Whether it is one of the published rerankers whose head is the embedding: (layers, D) of Qwen3-Reranker 0.6B and 4B and of
/// Qwen3-VL-Reranker 2B. GGUF files do not state whether a head is tied, so the size tells.
fn is_tied_reranker(architecture: &Architecture, plan: &Plan) -> bool {
    matches!(
        (architecture.gguf, plan.layers.len(), plan.width),
        ("qwen3", 28, 1024) | ("qwen3", 36, 2560) | ("qwen3vl", 28, 2048)
    )
}

/// Whether the architecture of this `model_type` has linear attention in some layers; its checkpoints' norms are zero-centred.
pub(crate) fn is_hybrid(model_type: &str) -> bool {
    ARCHITECTURES.iter().any(|a| a.model_type == model_type && a.is_hybrid)
}

/// The vision towers that go with the architecture of this `model_type`.
pub(crate) fn towers(model_type: &str) -> &'static [&'static str] {
    ARCHITECTURES.iter().find(|a| a.model_type == model_type).map_or(&[], |a| a.towers)
}

/// What GGUF files call the architecture that a plan names.
pub fn gguf_name(model_type: &str) -> Option<&'static str> {
    ARCHITECTURES.iter().find(|a| a.model_type == model_type).map(|a| a.gguf)
}

/// Refuses GGUF files that belong to a model and are none.
fn refuse_companions(gguf: &Gguf) -> Result<(), Error> {
    let meta = gguf.metadata();
    let (kind, name) = (meta.string("general.type")?, meta.string("general.architecture")?);
    let (found, hint) = match (kind, name) {
        (Some("adapter"), _) => ("an adapter (LoRA)", "name its base model as the model"),
        (Some("mmproj"), _) | (_, Some("clip")) => {
            ("the image part of a model (mmproj)", "name the language model's own file, which lies beside it")
        }
        (Some("imatrix"), _) | (_, Some("imatrix")) => ("an importance matrix", "name the model that it was made for"),
        (Some("vocab"), _) => ("a vocabulary without weights", "name a file with the model's weights"),
        _ => return Ok(()),
    };
    Err(Error::NotAModel { path: gguf.path().to_owned(), found, hint })
}

fn unknown(path: &Path, found: &str, names: &[&str]) -> Error {
    let as_gguf = ARCHITECTURES.iter().any(|a| a.gguf_only && a.model_type == found);
    // The longest common beginning decides: `qwen3moe` is nearer to qwen3 than to qwen2.
    let common = |name: &str| name.bytes().zip(found.bytes()).take_while(|(a, b)| a == b).count();
    let nearest = names.iter().max_by_key(|name| common(name)).filter(|name| common(name) >= 4);
    Error::Architecture {
        path: path.to_owned(),
        found: found.chars().take(64).collect(),
        supported: names.join(", "),
        nearest: match nearest {
            _ if as_gguf => format!("; {found} is read from GGUF files only, take one of those"),
            Some(name) => format!("; the nearest is {name}"),
            None if names.contains(&"qwen2") => "; the nearest is qwen2, for models of Qwen2 and Qwen2.5".to_owned(),
            None => String::new(),
        },
    }
}
