//! Data sets as hubs hold them: the same records as from JSON lines, and broken files are told.
#![cfg(feature = "parquet")]

use std::path::PathBuf;

use qwenkit_train::data::{Chat, Form, LabelKeys, Problem, Record, Source, read_file};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tune").join(name)
}

fn read(path: &std::path::Path) -> Result<(Source, Vec<(usize, Record)>), qwenkit_train::data::Faults> {
    let mut records = Vec::new();
    let source = read_file(path, &LabelKeys::default(), |row, record| {
        records.push((row, record));
        Ok(())
    })?;
    Ok((source, records))
}

#[test]
fn conversations_of_nested_columns_are_records() {
    let (source, records) = read(&fixture("conversations.parquet")).expect("readable");
    assert_eq!(source.form, Form::Messages);
    assert_eq!(source.remarks.unread.get("source"), Some(&2));
    assert_eq!(records.len(), 3);
    assert_eq!(records[0], (1, Record::Chat(Chat::of_turn("Hi", "Hello"))));
    let Record::Chat(last) = &records[2].1 else { panic!("a conversation") };
    assert_eq!(last.trained, [false, false, false, true]);
}

#[test]
fn numbers_of_labels_become_their_names() {
    let (source, records) = read(&fixture("labels.parquet")).expect("readable");
    assert_eq!((source.form, source.sha256.len()), (Form::Label, 64));
    let labels: Vec<&str> = records
        .iter()
        .map(|(_, record)| match record {
            Record::Label { label, .. } => label.as_str(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(labels, ["card", "top up", "card", "top up"]);
}

#[test]
fn broken_files_are_faults() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = std::fs::read(fixture("labels.parquet")).expect("readable");
    for length in [0, 3, 4, 100, whole.len() / 2, whole.len() - 1] {
        let path = folder.path().join("cut.parquet");
        std::fs::write(&path, &whole[..length]).expect("written");
        let faults = read(&path).expect_err("cut off");
        assert!(matches!(faults.shown()[0].problem, Problem::Parquet { .. }), "{length}: {faults}");
    }
}
