//! safetensors: other people's files, lone files, shards with their index, every refusal, and the writer.

mod encoder;

use std::collections::BTreeMap;
use std::path::Path;

use encoder::*;
use qwenkit_formats::{Checkpoint, Error, SafetensorsFile, read_safetensors_file, write_safetensors};
use qwenkit_tensor::DType;

const FOREIGN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/formats/foreign.safetensors");

fn bytes_of(file: &SafetensorsFile, name: &str) -> Vec<u8> {
    let tensor = file.tensor(name).unwrap();
    let mut bytes = vec![0; tensor.len_bytes];
    file.read(tensor, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_file_of_the_python_package_is_read_in_full() {
    let file = read_safetensors_file(Path::new(FOREIGN)).unwrap();
    assert_eq!(file.metadata()["note"], "grüße");
    let mut kinds: Vec<_> = file.tensors().iter().map(|t| (t.name.as_str(), t.dtype, t.shape.clone())).collect();
    kinds.sort();
    let expected = [
        ("empty", DType::F32, vec![0, 4]),
        ("half", DType::F16, vec![3, 64]),
        ("ids", DType::I64, vec![3]),
        ("logits", DType::F32, vec![3, 64]),
        ("mask", DType::Bool, vec![1, 2]),
        ("scalar", DType::F64, vec![]),
    ];
    assert_eq!(kinds, expected);
    let ids: Vec<u8> = [3_i64, 1, 2].into_iter().flat_map(i64::to_le_bytes).collect();
    assert_eq!(bytes_of(&file, "ids"), ids);
    assert_eq!(bytes_of(&file, "scalar"), 2.5_f64.to_le_bytes());
    let rows: Vec<u8> = (0..3 * 64).flat_map(|i| (i as f32 / 7.0 - 9.0).to_le_bytes()).collect();
    assert_eq!(bytes_of(&file, "logits"), rows);
    assert_eq!(file.size_bytes(), std::fs::metadata(FOREIGN).unwrap().len());
}

#[test]
fn written_files_read_back_and_are_the_same_every_time() {
    let folder = Folder::new();
    let (a, b) = (folder.path().join("a.safetensors"), folder.path().join("b.safetensors"));
    let kinds: Vec<DType> = DType::ALL.into_iter().filter(|t| !t.is_quantized()).collect();
    assert_eq!(kinds.len(), 15);
    let shapes: [&[usize]; 3] = [&[3], &[], &[2, 0]];
    let names: Vec<String> = kinds.iter().map(|k| format!("t.{}", k.name())).collect();
    let data: Vec<Vec<u8>> = kinds
        .iter()
        .enumerate()
        .map(|(i, k)| (0..k.tensor_bytes(shapes[i % 3]).unwrap()).map(|b| (b + i) as u8).collect())
        .collect();
    let mut tensors: Vec<(&str, DType, &[usize], &[u8])> =
        (0..kinds.len()).map(|i| (names[i].as_str(), kinds[i], shapes[i % 3], &data[i][..])).collect();
    let remarks = BTreeMap::from([("format".to_owned(), "pt".to_owned()), ("a".to_owned(), "b\"".to_owned())]);
    write_safetensors(&a, &tensors, &remarks).unwrap();
    tensors.reverse();
    write_safetensors(&b, &tensors, &remarks).unwrap();
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    assert_eq!(folder.names(), ["a.safetensors", "b.safetensors"]);
    let file = read_safetensors_file(&a).unwrap();
    assert_eq!((file.metadata(), file.tensors().len()), (&remarks, 15));
    for (name, dtype, shape, data) in tensors {
        let found = file.tensor(name).unwrap();
        assert_eq!((found.dtype, &found.shape[..]), (dtype, shape));
        assert_eq!(bytes_of(&file, name), data, "{name}");
        assert!(found.offset.is_multiple_of(dtype.block_bytes() as u64), "{name} is not aligned");
    }
    // An independent reader takes it, too.
    let bytes = std::fs::read(&a).unwrap();
    assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), 15);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let folder = Folder::new();
    let path = folder.path().join("m.safetensors");
    let refused = |tensors: &[(&str, DType, &[usize], &[u8])]| {
        let error = write_safetensors(&path, tensors, &BTreeMap::new()).unwrap_err();
        assert!(folder.names().is_empty());
        error
    };
    assert_error!(refused(&[("x", DType::F32, &[2], &[0; 7])]), WriteLength, "`x`", "got 7 bytes", "expected 8");
    assert_error!(refused(&[("x", DType::Q8_0, &[32], &[0; 34])]), WriteInvalid, "Q8_0", "one of BOOL");
    assert_error!(refused(&[("__metadata__", DType::U8, &[1], &[0])]), WriteInvalid, "keeps it for remarks");
    assert_error!(refused(&[("x", DType::U8, &[1], &[0]), ("x", DType::U8, &[1], &[0])]), DuplicateTensor, "`x`");
    assert_error!(refused(&[("x", DType::F64, &[usize::MAX, 2], &[])]), WriteInvalid, "fits in memory");
}

fn refused(bytes: impl AsRef<[u8]>) -> Error {
    let folder = Folder::new();
    read_safetensors_file(&folder.put("m.safetensors", bytes)).expect_err("the file is broken")
}

#[test]
fn wrong_kinds() {
    assert_error!(refused(b""), WrongKind, "m.safetensors", "not a safetensors file", "an empty file");
    assert_error!(refused("version https://git-lfs.github.com/spec/v1\n"), WrongKind, "Git LFS pointer");
    assert_error!(refused(small_gguf().bytes()), WrongKind, "a GGUF file");
    assert_error!(refused(b"\x80\x02}q\x00X\x01\x00\x00\x00"), WrongKind, "Python pickle", "can run code");
}

#[test]
fn header_lengths() {
    let mut long = safetensors("{}", 0);
    long[0] = 200;
    assert_error!(refused(&long), Truncated, "the safetensors header", "200 bytes", "byte 10");
    let huge = safetensors(&format!("{{{}}}", " ".repeat(32 << 20)), 0);
    assert_error!(refused(&huge), TooLarge, "a safetensors header", "33554432");
    let mut absurd = safetensors("{}       ", 0);
    absurd[..8].fill(0xff);
    assert_error!(refused(&absurd), WrongKind, "not a safetensors file");
}

#[test]
fn headers() {
    let one = |entry: &str, bytes| refused(safetensors(&format!("{{\"x\":{entry}}}"), bytes));
    assert_error!(refused(safetensors("{\"x\"", 8)), SafetensorsHeader, "m.safetensors", "EOF");
    assert_error!(
        refused([&b"\x04\0\0\0\0\0\0\0{\"\xff\"}"[..], &[0; 8]].concat()),
        SafetensorsHeader,
        "m.safetensors"
    );
    let overlapping =
        r#"{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
    assert_error!(refused(safetensors(overlapping, 6)), SafetensorsHeader, "m.safetensors", "y");
    let backwards = r#"{"dtype":"U8","shape":[1],"data_offsets":[1,0]}"#;
    assert_error!(one(backwards, 1), SafetensorsHeader, "`x`", "bytes 1 to 0");
    let wrong_size = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#;
    assert_error!(one(wrong_size, 4), SafetensorsHeader, "`x`", "found 4 bytes, expected 8 for shape [2] of F32");
    let overflow = r#"{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}"#;
    assert_error!(one(overflow, 4), SafetensorsHeader, "`x`", "4294967296");
    let axes = format!(r#"{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}"#, "1,".repeat(64));
    assert_error!(one(&axes, 1), SafetensorsHeader, "`x`", "65 axes", "at most 64");
    let twice =
        r#"{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    assert_error!(refused(safetensors(twice, 2)), SafetensorsHeader, "`x`", "found twice");
    let gap = r#"{"dtype":"U8","shape":[1],"data_offsets":[1,2]}"#;
    assert_error!(one(gap, 2), SafetensorsHeader, "x");
    assert_error!(one(r#"{"dtype":"F33","shape":[1],"data_offsets":[0,4]}"#, 4), SafetensorsHeader, "`x`", "F33");
    assert_error!(one(r#"{"dtype":"U8","shape":[-1],"data_offsets":[0,4]}"#, 4), SafetensorsHeader, "m.safetensors");
    let deep = format!("{{\"x\":{}}}", "[".repeat(50_000));
    assert_error!(refused(safetensors(&deep, 0)), SafetensorsHeader, "m.safetensors");
}

#[test]
fn lengths_of_the_data() {
    let header = r#"{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    assert_error!(refused(safetensors(header, 3)), SafetensorsLength, "m.safetensors", "64 bytes", "expected 65");
    assert_error!(refused(safetensors(header, 5)), SafetensorsLength, "66 bytes", "expected 65");
}

#[test]
fn types_without_a_name_here() {
    let error = refused(safetensors(r#"{"x":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}"#, 8));
    assert_error!(error, TensorType, "tensor `x`", "C64", "does not read", "BF16");
}

const INDEX: &str = "model.safetensors.index.json";

/// A checkpoint with shards "1" (tensor a) and "2" (tensors b, c) under this index.
fn sharded(weight_map: &str) -> (Folder, Result<Checkpoint, Error>) {
    let folder = Folder::new();
    let entry = |name: &str, start: usize| {
        format!(r#""{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{start},{}]}}"#, start + 4)
    };
    folder.put("config.json", "{}");
    folder.put("1.safetensors", safetensors(&format!("{{{}}}", entry("a", 0)), 4));
    folder.put("2.safetensors", safetensors(&format!("{{{},{}}}", entry("b", 0), entry("c", 4)), 8));
    folder.put(INDEX, format!(r#"{{"metadata":{{"total_size":12}},"weight_map":{weight_map}}}"#));
    let opened = Checkpoint::open(folder.path());
    (folder, opened)
}

#[test]
fn shards_are_read_as_one_model() {
    let (_folder, opened) = sharded(r#"{"c":"2.safetensors","b":"2.safetensors","a":"1.safetensors"}"#);
    let model = opened.unwrap();
    let names: Vec<_> = model.tensors().iter().map(|t| (t.name.as_str(), t.part)).collect();
    assert_eq!(names, [("a", 0), ("b", 1), ("c", 1)]);
    let mut bytes = [0; 3];
    model.read(model.tensor("c").unwrap(), 1, &mut bytes).unwrap();
    assert_eq!((bytes, model.parts().len()), ([5, 6, 7], 2));
}

#[test]
fn index_and_shards_must_agree() {
    let error = |map: &str| sharded(map).1.unwrap_err();
    let extra = error(r#"{"a":"1.safetensors","b":"2.safetensors"}"#);
    assert_error!(extra, IndexTensorExtra, INDEX, "`2.safetensors` holds tensor `c`", "1 such");
    let missing =
        r#"{"a":"1.safetensors","b":"2.safetensors","c":"2.safetensors","d":"1.safetensors","e":"1.safetensors"}"#;
    assert_error!(error(missing), IndexTensorMissing, INDEX, "`d`", "`1.safetensors`", "2 such");
    let elsewhere = error(r#"{"a":"2.safetensors","b":"2.safetensors","c":"2.safetensors"}"#);
    assert_error!(elsewhere, IndexTensorMissing, "`a`", "`2.safetensors`");
    let swapped = error(r#"{"a":"2.safetensors","b":"1.safetensors","c":"2.safetensors"}"#);
    assert_error!(swapped, IndexTensorExtra, "`1.safetensors` holds tensor `a`", "2 such");
    let absent = error(r#"{"a":"1.safetensors","b":"3.safetensors","c":"4.safetensors"}"#);
    assert_error!(absent, ShardMissing, INDEX, "2 of 3 shards", "`3.safetensors`");
    for outside in ["../1.safetensors", "/etc/passwd", "x/1.safetensors", "", ".."] {
        assert_error!(error(&format!(r#"{{"a":"{outside}"}}"#)), ShardName, INDEX, outside, "in the same folder");
    }
    assert_error!(error(r#"{"a":1}"#), KeyType, "weight_map.a", "the name of a file");
    assert_error!(error("[]"), KeyType, "weight_map", "an object");
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let (folder, _) = sharded("{}");
    std::fs::copy(folder.path().join("1.safetensors"), folder.path().join("0.safetensors")).unwrap();
    let map = r#"{"weight_map":{"a":"1.safetensors","z":"0.safetensors"}}"#;
    folder.put(INDEX, map);
    let error = Checkpoint::open(folder.path()).unwrap_err();
    assert_error!(error, IndexTensorExtra, "`0.safetensors` holds tensor `a`");
}
