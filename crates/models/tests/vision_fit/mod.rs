//! Which towers go with which models: every model's own, and no other's.

use std::{fs, path::Path};

use qwenkit_formats::{
    ModelFiles,
    gguf::{Array, Value},
};
use qwenkit_models::{Error, VisionPlan, arch, vision_plan};

use crate::{
    assert_says,
    moe_run::{Tensor, checkpoint, fixture, tensors},
    vision_run::mmproj,
};

fn plan_of(model: &Path, mmproj: &Path) -> Result<VisionPlan, Error> {
    let files = ModelFiles::open(model).unwrap();
    vision_plan(&files, Some(&ModelFiles::open(mmproj).unwrap()), &arch::plan(&files).unwrap())
}

/// The tower's file of the checkpoint `name`, made of that of Qwen3-VL, whose shape it has. Its merger's norm is the checkpoint's own.
fn made_of_qwen3_vl(name: &str, general_name: &str, is_stacked: bool) -> (tempfile::TempDir, std::path::PathBuf) {
    let norm = tensors(&fixture(name)).into_iter().find(|t| t.name.ends_with("visual.merger.norm.weight")).unwrap();
    mmproj(
        "qwen3-vl",
        |meta| {
            meta.set("general.name", Value::String(general_name.into()));
            if !is_stacked {
                meta.set("clip.vision.is_deepstack_layers", Value::Array(Array::Bool(vec![false; 3])));
            }
        },
        |all| {
            all.retain(|t| is_stacked || !t.name.starts_with("v.deepstack."));
            all.iter_mut().find(|t| t.name == "v.post_ln.weight").unwrap().bytes = norm.bytes.clone();
        },
    )
}

#[test]
fn a_checkpoint_folder_sees_by_its_own_tower_alone() {
    let (_moe_folder, moe) = made_of_qwen3_vl("qwen3-vl-moe", "Qwen3 Vl Moe", true);
    let (_later_folder, later) = made_of_qwen3_vl("qwen3.5-vision", "Qwen3.5 Vision", false);
    let own = |name: &str| fixture(name).join("mmproj.gguf");
    let towers = [
        ("qwen2-vl", own("qwen2-vl")),
        ("qwen2.5-vl", own("qwen2.5-vl")),
        ("qwen3-vl", own("qwen3-vl")),
        ("qwen3-vl-moe", moe),
        ("qwen3.5-vision", later),
    ];
    for (model, _) in &towers {
        for (of, tower) in &towers {
            let what = format!("{model} by the tower of {of}");
            match plan_of(&fixture(model), tower) {
                Ok(plan) => {
                    assert_eq!(model, of, "{what} is accepted");
                    // The folder says more than the mmproj file, so its word is taken.
                    let files = ModelFiles::open(&fixture(model)).unwrap();
                    assert_eq!(plan, vision_plan(&files, None, &arch::plan(&files).unwrap()).unwrap(), "{what}");
                }
                Err(error @ Error::OtherTower { .. }) => {
                    assert_ne!(model, of, "{what}: {error}");
                    assert_says(
                        &error.to_string(),
                        &["is the tower of another model: its", "expected", "what fits is a "],
                    );
                }
                Err(error) => panic!("{what}: {error}"),
            }
        }
    }
}

#[test]
fn a_tower_that_differs_in_one_number_or_in_its_values_is_refused() {
    let model = fixture("qwen3-vl");
    let refused = |(_folder, path): (tempfile::TempDir, std::path::PathBuf), parts: &[&str]| {
        assert_says(&plan_of(&model, &path).unwrap_err().to_string(), parts);
    };
    let set = |key: &'static str, value: u32| mmproj("qwen3-vl", |meta| meta.set(key, Value::U32(value)), |_| {});
    refused(set("clip.vision.block_count", 4), &["its depth is 4, expected 3 as in", "config.json"]);
    refused(set("clip.vision.attention.head_count", 2), &["its number of heads is 2, expected 4"]);
    refused(set("clip.vision.patch_size", 14), &["its patch is 2 x 14 x 14 x 3, 2 x 2 merged, expected 2 x 16 x 16"]);
    let stacked = Value::Array(Array::Bool(vec![true, false, true]));
    let moved = mmproj("qwen3-vl", |meta| meta.set("clip.vision.is_deepstack_layers", stacked), |_| {});
    refused(moved, &["its list of DeepStack layers is [0, 2], expected [0, 1]"]);
    let nudge = |all: &mut Vec<Tensor>| {
        let norm = all.iter_mut().find(|t| t.name == "v.post_ln.weight").unwrap();
        let value = f32::from_le_bytes(norm.bytes[..4].try_into().unwrap()) + 0.05;
        norm.bytes[..4].copy_from_slice(&value.to_le_bytes());
    };
    refused(mmproj("qwen3-vl", |_| {}, nudge), &["its content is other values, expected those of the tower in"]);
}

/// A folder that says it has a tower and holds none: the names tell.
#[test]
fn without_a_tower_to_compare_the_names_tell() {
    let text: Vec<Tensor> = tensors(&fixture("qwen3-vl")).into_iter().filter(|t| !t.name.contains("visual.")).collect();
    let folder = checkpoint("qwen3-vl", |_| {}, &text);
    let named = |name: &str| {
        let (_folder, path) = mmproj("qwen3-vl", |meta| meta.set("general.name", Value::String(name.into())), |_| {});
        plan_of(folder.path(), &path).map(|_| ()).map_err(|error| error.to_string())
    };
    for fits in ["Qwen3 Vl", "Qwen3-VL-4B-Instruct", "a tower", "Qwen VL"] {
        assert_eq!(named(fits), Ok(()), "{fits}");
    }
    for other in ["Qwen2.5 Vl", "Qwen3 Vl Moe", "Qwen3.6 27B"] {
        let model = format!("its model is `{other}`, expected that of a qwen3_vl model");
        assert_says(&named(other).unwrap_err(), &[&model]);
    }
}

#[test]
fn the_windows_of_a_mmproj_file_come_from_a_config_of_the_same_tower_or_are_a_guess() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["model.gguf", "mmproj.gguf"] {
        fs::copy(fixture("qwen2.5-vl").join(file), folder.path().join(file)).unwrap();
    }
    let plan = || plan_of(&folder.path().join("model.gguf"), &folder.path().join("mmproj.gguf")).unwrap();
    // Sides in merged squares of 28 pixels.
    let side = |plan: &VisionPlan| plan.windows.as_ref().unwrap().side;
    let guessed = |why: &str| {
        let plan = plan();
        assert_eq!(side(&plan), 4, "{why}");
        assert!(plan.guess().is_some_and(|guess| guess.contains("112 pixels")), "{why}");
    };
    guessed("no config");
    let config = folder.path().join("config.json");
    for other in ["qwen2-vl", "qwen3-vl", "qwen3"] {
        fs::copy(fixture(other).join("config.json"), &config).unwrap();
        guessed(other);
    }
    let own = fs::read_to_string(fixture("qwen2.5-vl").join("config.json")).unwrap();
    fs::write(&config, own.replace("\"depth\": 3", "\"depth\": 4")).unwrap();
    guessed("a config of a deeper tower");
    fs::write(&config, "{").unwrap();
    guessed("no config at all");
    fs::write(&config, own).unwrap();
    assert_eq!((side(&plan()), plan().guess()), (2, None));
    // A file that states them needs no config, as those of `quantize` do.
    let (stated, path) = mmproj("qwen2.5-vl", |meta| meta.set("clip.vision.window_size", Value::U32(56)), |_| {});
    let found = plan_of(&fixture("qwen2.5-vl").join("model.gguf"), &path).unwrap();
    assert_eq!((side(&found), found.guess()), (2, None));
    drop(stated);
}

#[test]
fn what_fits_is_said_to_whoever_has_no_tower_or_no_mmproj() {
    let model = fixture("qwen3-vl").join("model.gguf");
    let files = ModelFiles::open(&model).unwrap();
    let text = arch::plan(&files).unwrap();
    let fits = "what fits is a qwen3_vl tower (`clip.projector_type` qwen3vl_merger)";
    assert_says(&vision_plan(&files, None, &text).unwrap_err().to_string(), &["found none", fits]);
    assert_says(&plan_of(&model, &model).unwrap_err().to_string(), &["holds a qwen3vl model", fits]);
    let both = "a qwen2_vl tower (`clip.projector_type` qwen2vl_merger) or a qwen2_5_vl tower";
    let model = fixture("qwen2-vl").join("model.gguf");
    assert_says(&plan_of(&model, &fixture("qwen3-vl").join("mmproj.gguf")).unwrap_err().to_string(), &[both]);
}
