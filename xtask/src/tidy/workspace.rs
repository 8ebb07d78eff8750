//! The workspace's crates as cargo sees them: names, folders, dependencies, root files.
//!
//! Read from `cargo metadata --no-deps`, which resolves nothing and needs no network. What the floors and roots must
//! look like is judged elsewhere.

use std::{path::Path, process::Command};

use serde_json::Value;

/// One workspace member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Crate {
    /// The package name.
    pub(super) name: String,
    /// Its folder relative to the root, with `/` between folders.
    pub(super) folder: String,
    /// Names of everything it depends on: normal, build and dev dependencies alike.
    pub(super) dependencies: Vec<String>,
    /// Root files of its libraries and binaries, relative to the workspace root.
    pub(super) roots: Vec<String>,
}

/// Asks cargo for the members of the workspace at `root`.
pub(super) fn read(root: &Path) -> Result<Vec<Crate>, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--manifest-path"])
        .arg(root.join("Cargo.toml"))
        .output()
        .map_err(|error| format!("cannot run cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim_end()));
    }
    let metadata: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata wrote no JSON: {error}"))?;
    members(&metadata).ok_or_else(|| "cargo metadata: found another form than that of format version 1".to_owned())
}

/// The members in a metadata document; None when it has another form.
fn members(metadata: &Value) -> Option<Vec<Crate>> {
    let root = metadata["workspace_root"].as_str()?;
    let relative = |path: &Value| {
        let path = Path::new(path.as_str()?).strip_prefix(root).ok()?;
        Some(path.to_str()?.replace('\\', "/"))
    };
    metadata["packages"].as_array()?.iter().map(|package| member(package, relative)).collect()
}

/// One member; `relative` takes the workspace root off a path.
fn member(package: &Value, relative: impl Fn(&Value) -> Option<String>) -> Option<Crate> {
    let manifest = relative(&package["manifest_path"])?;
    let folder = manifest.strip_suffix("Cargo.toml")?.trim_end_matches('/').to_owned();
    let dependencies = package["dependencies"].as_array()?.iter();
    let dependencies =
        dependencies.map(|dependency| Some(dependency["name"].as_str()?.to_owned())).collect::<Option<_>>()?;
    let mut roots = Vec::new();
    for target in package["targets"].as_array()? {
        // Tests, examples, benches and build scripts are roots of their own, which end in no library or binary.
        let outside = ["test", "example", "bench", "custom-build"];
        if !target["kind"].as_array()?.iter().any(|kind| outside.iter().any(|name| kind == name)) {
            roots.push(relative(&target["src_path"])?);
        }
    }
    Some(Crate { name: package["name"].as_str()?.to_owned(), folder, dependencies, roots })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn members_carry_all_kinds_of_dependencies_and_only_product_roots() {
        let metadata = json!({
            "workspace_root": "/w",
            "packages": [{
                "name": "qwenkit-text",
                "manifest_path": "/w/crates/text/Cargo.toml",
                "dependencies": [
                    {"name": "serde", "kind": null}, {"name": "qwenkit-tensor", "kind": "dev"}, {"name": "cc", "kind": "build"}
                ],
                "targets": [
                    {"kind": ["lib"], "src_path": "/w/crates/text/src/lib.rs"},
                    {"kind": ["bin"], "src_path": "/w/crates/text/src/main.rs"},
                    {"kind": ["test"], "src_path": "/w/crates/text/tests/contract.rs"},
                    {"kind": ["custom-build"], "src_path": "/w/crates/text/build.rs"}
                ]
            }]
        });
        let expected = Crate {
            name: "qwenkit-text".to_owned(),
            folder: "crates/text".to_owned(),
            dependencies: ["serde", "qwenkit-tensor", "cc"].map(str::to_owned).to_vec(),
            roots: ["crates/text/src/lib.rs", "crates/text/src/main.rs"].map(str::to_owned).to_vec(),
        };
        assert_eq!(members(&metadata), Some(vec![expected]));
    }

    #[test]
    fn another_form_is_refused() {
        assert_eq!(members(&json!({"packages": []})), None);
        assert_eq!(members(&json!({"workspace_root": "/w", "packages": [{"name": "a"}]})), None);
    }
}
