//! The floors of the house: which crate may depend on which.
//!
//! A crate depends only on crates of lower floors, never sideways, with dev and build dependencies counted too; nothing
//! depends on a crate outside the house. A crate without a floor is refused, so the map stays whole. External crates
//! are not judged here.

use super::{Finding, tree::Tree, workspace::Crate};

/// Floors from the ground up, by folder name under `crates/`.
const FLOORS: [&[&str]; 6] = [
    &["tensor"],
    &["kernels", "formats", "text", "media", "hub"],
    &["models"],
    &["engine"],
    &["server", "train", "quantize", "eval", "audit"],
    &["cli"],
];

/// Members of the workspace that are no part of the product, by folder: they may use every crate, no crate them.
const OUTSIDE: [&str; 1] = ["xtask"];

/// Where a crate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Floor(usize),
    Outside,
}

/// The place of the crate in `folder`; None when the map has none.
fn place(folder: &str) -> Option<Place> {
    if OUTSIDE.contains(&folder) {
        return Some(Place::Outside);
    }
    let short = folder.strip_prefix("crates/")?;
    FLOORS.iter().position(|floor| floor.contains(&short)).map(Place::Floor)
}

/// Checks every edge between workspace members, and that every member has a floor and the name of its folder.
pub(super) fn check(crates: &[Crate], tree: &Tree) -> Vec<Finding> {
    crates.iter().flat_map(|from| check_crate(from, crates, tree)).collect()
}

fn check_crate(from: &Crate, crates: &[Crate], tree: &Tree) -> Vec<Finding> {
    let manifest = format!("{}/Cargo.toml", from.folder);
    let Some(from_place) = place(&from.folder) else {
        let what = format!("the crate `{}` in `{}` has no floor", from.name, from.folder);
        return vec![Finding::new(
            &manifest,
            1,
            what,
            "its folder in FLOORS in xtask/src/tidy/floors.rs and docs/LEGEND.md",
        )];
    };
    let mut findings = Vec::new();
    let name = package_name(&from.folder);
    if from.name != name {
        findings.push(Finding::new(&manifest, 1, format!("the package is named `{}`", from.name), format!("`{name}`")));
    }
    let Place::Floor(from_floor) = from_place else { return findings };
    for dependency in &from.dependencies {
        let Some(to) = crates.iter().find(|other| other.name == *dependency) else { continue };
        let to_place = match place(&to.folder) {
            Some(Place::Floor(to_floor)) if to_floor < from_floor => continue,
            Some(Place::Floor(to_floor)) => format!("floor {to_floor}"),
            Some(Place::Outside) => "outside".to_owned(),
            // It is reported once, as a crate without a floor.
            None => continue,
        };
        let what = format!("`{}` (floor {from_floor}) depends on `{dependency}` ({to_place})", from.name);
        let expected = match from_floor {
            0 => "no crate of the workspace below floor 0".to_owned(),
            _ => format!("only crates below floor {from_floor}"),
        };
        findings.push(Finding::new(&manifest, manifest_line(tree, &manifest, dependency), what, expected));
    }
    findings
}

/// Folders carry no prefix, packages do; the binary's package has the program's own name.
fn package_name(folder: &str) -> String {
    match folder.strip_prefix("crates/") {
        Some("cli") => "qwenkit".to_owned(),
        Some(short) => format!("qwenkit-{short}"),
        None => folder.to_owned(),
    }
}

/// The line of `manifest` that names `dependency`, or 1.
fn manifest_line(tree: &Tree, manifest: &str, dependency: &str) -> usize {
    let text = tree.text(manifest).unwrap_or_default();
    let names_it = |line: &str| line.split(['=', '.', ' ']).next() == Some(dependency);
    text.lines().position(names_it).map_or(1, |line| line + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(folder: &str, dependencies: &[&str]) -> Crate {
        Crate {
            name: package_name(folder),
            folder: folder.to_owned(),
            dependencies: dependencies.iter().map(|name| (*name).to_owned()).collect(),
            roots: Vec::new(),
        }
    }

    /// The findings, as printed, on a workspace where `crates/text` has these dependencies.
    fn found(dependencies: &[&str]) -> Vec<String> {
        let crates = [
            member("crates/tensor", &[]),
            member("crates/text", dependencies),
            member("crates/formats", &["qwenkit-tensor"]),
            member("crates/engine", &["qwenkit-text", "qwenkit-tensor"]),
            member("xtask", &["qwenkit-engine"]),
        ];
        let manifest =
            "[dependencies]\nserde = \"1\"\nqwenkit-engine = { workspace = true }\nqwenkit-formats.workspace = true\n";
        let tree = Tree::of(&[("crates/text/Cargo.toml", manifest)]);
        check(&crates, &tree).iter().map(Finding::to_string).collect()
    }

    #[test]
    fn lower_floors_and_external_crates_pass() {
        assert_eq!(found(&["qwenkit-tensor", "serde"]), Vec::<String>::new());
    }

    #[test]
    fn upwards_sideways_and_outside_fail() {
        assert_eq!(
            found(&["qwenkit-engine", "qwenkit-formats", "xtask"]),
            [
                "crates/text/Cargo.toml:3: `qwenkit-text` (floor 1) depends on `qwenkit-engine` (floor 3) (expected only \
                 crates below floor 1)",
                "crates/text/Cargo.toml:4: `qwenkit-text` (floor 1) depends on `qwenkit-formats` (floor 1) (expected only \
                 crates below floor 1)",
                "crates/text/Cargo.toml:1: `qwenkit-text` (floor 1) depends on `xtask` (outside) (expected only crates \
                 below floor 1)",
            ]
        );
    }

    #[test]
    fn a_crate_without_a_floor_fails_and_is_told_where_to_go() {
        let findings = check(&[member("crates/attic", &[])], &Tree::of(&[]));
        assert_eq!(
            findings[0].to_string(),
            "crates/attic/Cargo.toml:1: the crate `qwenkit-attic` in `crates/attic` has no floor (expected its folder in \
             FLOORS in xtask/src/tidy/floors.rs and docs/LEGEND.md)"
        );
    }

    #[test]
    fn a_package_must_have_the_name_of_its_folder() {
        let mut odd = member("crates/hub", &[]);
        odd.name = "qwenkit-hubs".to_owned();
        let found = check(&[odd], &Tree::of(&[]));
        assert_eq!(
            found[0].to_string(),
            "crates/hub/Cargo.toml:1: the package is named `qwenkit-hubs` (expected `qwenkit-hub`)"
        );
        assert_eq!(check(&[member("crates/cli", &[])], &Tree::of(&[])), []);
    }

    #[test]
    fn the_legend_shows_these_floors() {
        let legend = include_str!("../../../docs/LEGEND.md");
        let floor = |(number, names): (usize, &&[&str])| format!("{number} {}", names.join(" "));
        let floors: Vec<String> = FLOORS.iter().enumerate().map(floor).collect();
        let map = format!("{}\n{} | outside {}\n", floors[..4].join(" | "), floors[4..].join(" | "), OUTSIDE.join(" "));
        assert!(legend.contains(&map), "docs/LEGEND.md should hold these two lines:\n{map}");
    }
}
