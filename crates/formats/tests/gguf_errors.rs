//! Each way in which a GGUF file can be wrong: the variant of the error, and a message with file, thing, found, expected.

mod encoder;

use std::path::Path;

use encoder::*;
use qwenkit_formats::{Error, Gguf as Opened, ModelFiles};

/// The error of opening these bytes as `m.gguf`.
fn refused(bytes: impl AsRef<[u8]>) -> Error {
    let folder = Folder::new();
    Opened::open(&folder.put("m.gguf", bytes)).expect_err("the file is broken")
}

#[test]
fn not_found() {
    assert_error!(Opened::open(Path::new("/nonexistent/m.gguf")).unwrap_err(), NotFound, "m.gguf", "does not exist");
}

#[test]
fn io() {
    let folder = Folder::new();
    let file = folder.put("m.gguf", b"");
    assert_error!(Opened::open(&file.join("inside")).unwrap_err(), Io, "cannot open", "m.gguf");
}

#[test]
fn not_a_file() {
    let folder = Folder::new();
    assert_error!(Opened::open(folder.path()).unwrap_err(), NotAFile, "a folder", "expected a regular file");
}

#[cfg(unix)]
#[test]
fn not_a_file_but_a_device() {
    assert_error!(Opened::open(Path::new("/dev/zero")).unwrap_err(), NotAFile, "/dev/zero", "device or pipe");
}

#[test]
fn wrong_kind() {
    assert_error!(refused(b""), WrongKind, "m.gguf", "an empty file", "fetch it again");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 491400064\n";
    assert_error!(refused(pointer), WrongKind, "Git LFS pointer", "git lfs pull --include=m.gguf");
    assert_error!(refused("<!DOCTYPE html><title>Login</title>"), WrongKind, "an HTML page");
    assert_error!(refused(b"PK\x03\x04rest"), WrongKind, "zip archive");
    assert_error!(refused(small_safetensors()), WrongKind, "a safetensors file", "checkpoint folder");
    assert_error!(refused(b"GGU"), WrongKind, "47 47 55");
}

#[test]
fn versions() {
    let with = |version| Gguf { version, ..small_gguf() }.bytes();
    assert_error!(refused(with(1)), GgufVersion, "m.gguf", "version 1", "expected version 2 or 3", "convert");
    assert_error!(refused(with(4)), GgufVersion, "version 4");
    assert_error!(refused(with(0)), GgufVersion, "version 0");
    assert_error!(refused(with(3_u32.swap_bytes())), GgufBigEndian, "big-endian", "version 3", "little-endian");
}

#[test]
fn truncated() {
    assert_error!(refused(&small_gguf().bytes()[..15]), Truncated, "the GGUF header", "8 bytes at byte 8", "byte 15");
    let key_cut = Gguf { pair_count: Some(1), ..Gguf::new() }.pair("abc", U32, &u32s(&[1])).bytes();
    assert_error!(refused(&key_cut[..24 + 13]), Truncated, "key `abc`");
}

#[test]
fn counts() {
    let pairs = Gguf { pair_count: Some(u64::MAX), ..Gguf::new() }.data(64).bytes();
    assert_error!(refused(pairs), Count, "key count", "18446744073709551615", "at most 5", "room");
    let many = Gguf { pair_count: Some((1 << 16) + 1), ..Gguf::new() }.data(1 << 20).bytes();
    assert_error!(refused(many), Count, "key count", "65537", "at most 65536", "no real model");
    let entries = Gguf { tensor_count: Some((1 << 20) + 1), ..Gguf::new() }.data(26 << 20).bytes();
    assert_error!(refused(entries), Count, "tensor count", "1048577", "at most 1048576", "no real model");
    let tensors = Gguf { tensor_count: Some(1 << 40), ..Gguf::new() }.data(64).bytes();
    assert_error!(refused(tensors), Count, "tensor count", "1099511627776");
    let key = Gguf { pair_count: Some(1), ..Gguf::new() }.data(64);
    let mut long_key = key.header();
    long_key.extend((1_u64 << 62).to_le_bytes());
    long_key.extend([0; 32]);
    assert_error!(
        refused(long_key),
        Count,
        "length of the name of metadata key 0",
        "4611686018427387904",
        "at most 32"
    );
    let text = Gguf::new().pair("k", STRING, &u64::MAX.to_le_bytes()).bytes();
    assert_error!(refused(text), Count, "length of key `k`");
    let numbers = Gguf::new().pair("k", ARRAY, &array(F64, 1 << 61, &[0; 8])).bytes();
    assert_error!(refused(numbers), Count, "array length of key `k`", "2305843009213693952");
    let strings = Gguf::new().pair("k", ARRAY, &array(STRING, 2, &[string("a"), vec![0xff; 8]].concat())).bytes();
    assert_error!(refused(strings), Count, "string length in the array of key `k`");
}

#[test]
fn not_utf8() {
    let value = Gguf::new().pair("k", STRING, &string(b"a\xff")).bytes();
    assert_error!(refused(value), NotUtf8, "m.gguf", "key `k`", "not UTF-8", "expected text");
    assert_error!(refused(Gguf::new().pair(b"\xc3\x28", U8, &[1]).bytes()), NotUtf8, "name of metadata key 0");
    let torn = array(STRING, 2, &[string(b"a\xc3"), string(b"\xa4")].concat());
    assert_error!(refused(Gguf::new().pair("k", ARRAY, &torn).bytes()), NotUtf8, "string 0 of key `k`");
}

#[test]
fn bad_bool() {
    assert_error!(refused(Gguf::new().pair("k", BOOL, &[2]).bytes()), BadBool, "key `k`", "byte 2", "0 or 1");
    assert_error!(refused(Gguf::new().pair("k", ARRAY, &array(BOOL, 2, &[1, 9])).bytes()), BadBool, "byte 9");
}

#[test]
fn value_type() {
    assert_error!(refused(Gguf::new().pair("k", 13, &[0; 8]).bytes()), ValueType, "key `k`", "value type 13", "12");
    assert_error!(refused(Gguf::new().pair("k", ARRAY, &array(77, 0, &[])).bytes()), ValueType, "value type 77");
}

#[test]
fn nesting() {
    let nested = |levels| (1..levels).fold(array(U8, 1, &[1]), |inner, _| array(ARRAY, 1, &inner));
    let folder = Folder::new();
    let fine = folder.put("m.gguf", Gguf::new().pair("k", ARRAY, &nested(4)).bytes());
    assert!(Opened::open(&fine).is_ok());
    assert_error!(refused(Gguf::new().pair("k", ARRAY, &nested(5)).bytes()), Nesting, "key `k`", "deeper than 4");
    assert_error!(refused(Gguf::new().pair("k", ARRAY, &nested(5_000)).bytes()), Nesting, "key `k`");
}

#[test]
fn duplicates() {
    let keys = Gguf::new().pair("k", U8, &[1]).pair("k", U8, &[1]).bytes();
    assert_error!(refused(keys), DuplicateKey, "m.gguf", "`k`", "found twice");
    let tensors = Gguf::new().tensor("a", &[1], 0, 0).tensor("a", &[1], 0, 32).data(64).bytes();
    assert_error!(refused(tensors), DuplicateTensor, "m.gguf", "`a`", "found twice");
}

#[test]
fn alignment() {
    for wrong in [0_u32, 48, 1 << 21] {
        let file = Gguf::new().pair("general.alignment", U32, &u32s(&[wrong])).bytes();
        assert_error!(refused(file), Alignment, "m.gguf", &wrong.to_string(), "a power of two up to 1048576");
    }
    let text = Gguf::new().pair("general.alignment", STRING, &string("32")).bytes();
    assert_error!(refused(text), KeyType, "general.alignment", "the string \"32\"", "non-negative integer");
}

#[test]
fn tensor_type() {
    for (id, name) in [(16, "IQ2_XXS"), (15, "Q8_K"), (34, "TQ1_0"), (39, "MXFP4"), (1000, "number 1000")] {
        let file = Gguf::new().tensor("x", &[256], id, 0).data(1024).bytes();
        assert_error!(refused(file), TensorType, "tensor `x`", name, "which QwenKit does not read", "Q4_K");
    }
}

#[test]
fn axis_count() {
    let file = Gguf::new().tensor("x", &[1; 5], 0, 0).data(4).bytes();
    assert_error!(refused(file), AxisCount, "tensor `x`", "5 axes", "at most 4");
}

#[test]
fn shapes() {
    let with = |dims: &[u64], kind| refused(Gguf::new().tensor("x", dims, kind, 0).data(64).bytes());
    assert_error!(with(&[4, 0], 0), Shape, "tensor `x`", "[0, 4]", "no empty axis");
    assert_error!(with(&[33], 8), Shape, "[33] of Q8_0", "a multiple of 32");
    assert_error!(with(&[128, 2], 12), Shape, "[2, 128] of Q4_K", "a multiple of 256");
    assert_error!(with(&[1 << 32, 1 << 32], 0), Shape, "fits in memory");
    assert_error!(with(&[u64::MAX, 1], 0), Shape, "18446744073709551615");
}

#[test]
fn offsets() {
    let unaligned = Gguf::new().tensor("x", &[1], 0, 4).data(64).bytes();
    assert_error!(refused(unaligned), OffsetUnaligned, "tensor `x`", "offset 4", "multiple of the alignment 32");
    let beyond = Gguf::new().tensor("x", &[16], 0, 32).data(95).bytes();
    assert_error!(refused(beyond), OutsideFile, "tensor `x`", "bytes 96 to 160", "159 bytes");
    let wrapping = Gguf::new().tensor("x", &[16], 0, u64::MAX - 31).data(64).bytes();
    assert_error!(refused(wrapping), OutsideFile, "tensor `x`");
    let large = Gguf::new().tensor("x", &[1 << 40], 24, 0).data(64).bytes();
    assert_error!(refused(large), OutsideFile, "tensor `x`");
}

#[test]
fn overlap() {
    let file = Gguf::new().tensor("x", &[9], 0, 32).tensor("y", &[1], 0, 64).tensor("z", &[1], 0, 0).data(128).bytes();
    assert_error!(refused(file), Overlap, "`x` and `y`", "m.gguf");
    let same = Gguf::new().tensor("x", &[1], 0, 0).tensor("y", &[1], 0, 0).data(32).bytes();
    assert_error!(refused(same), Overlap, "`x`", "`y`");
}

#[test]
fn read_range_and_a_file_cut_after_opening() {
    let folder = Folder::new();
    let path = folder.put("m.gguf", small_gguf().bytes());
    let model = ModelFiles::open(&path).unwrap();
    let b = model.tensor("b").unwrap();
    assert_error!(model.read(b, 30, &mut [0; 5]).unwrap_err(), ReadRange, "tensor `b`", "30 to 35", "34 bytes");
    assert_error!(model.read(b, usize::MAX, &mut [0; 5]).unwrap_err(), ReadRange, "tensor `b`");
    let mut foreign = b.clone();
    foreign.part = 3;
    assert_error!(model.read(&foreign, 0, &mut [0; 5]).unwrap_err(), ReadRange, "tensor `b`");
    foreign = b.clone();
    foreign.offset = u64::MAX - 1;
    assert_error!(model.read(&foreign, 0, &mut [0; 5]).unwrap_err(), Truncated, "tensor `b`");

    std::fs::File::options().write(true).open(&path).unwrap().set_len(b.offset + 3).unwrap();
    assert!(model.read(b, 0, &mut [0; 3]).is_ok());
    assert_error!(model.read(b, 0, &mut [0; 4]).unwrap_err(), Truncated, "tensor `b`", "cut short");
}

#[test]
fn split_models() {
    let part = |no: u16, count: u16, tensors: u32, name: &str| {
        Gguf::new()
            .pair("split.no", U16, &no.to_le_bytes())
            .pair("split.count", U16, &count.to_le_bytes())
            .pair("split.tensors.count", I32, &tensors.to_le_bytes())
            .tensor(name, &[1], 0, 0)
            .data(4)
            .bytes()
    };
    let lone = |no, count| refused(part(no, count, 2, "a"));
    assert_error!(lone(0, 2), SplitName, "m.gguf", "part 1 of 2", "-00001-of-00002.gguf");
    assert_error!(lone(2, 2), SplitMismatch, "split.no", "found 2", "less than `split.count`, which is 2");

    let open = |files: &[(&str, Vec<u8>)]| {
        let folder = Folder::new();
        let paths: Vec<_> = files.iter().map(|(name, bytes)| folder.put(name, bytes)).collect();
        Opened::open(&paths[0]).map(|_| ())
    };
    let (first, second) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    assert!(open(&[(first, part(0, 2, 2, "a")), (second, part(1, 2, 2, "b"))]).is_ok());
    let missing = open(&[(second, part(1, 2, 2, "b"))]).unwrap_err();
    assert_error!(missing, SplitMissing, "part 1 of 2", first);
    let swapped = open(&[(first, part(0, 2, 2, "a")), (second, part(0, 2, 2, "b"))]).unwrap_err();
    assert_error!(swapped, SplitMismatch, second, "split.no", "found 0, expected 1");
    let of_three = open(&[(first, part(0, 2, 2, "a")), (second, part(1, 3, 2, "b"))]).unwrap_err();
    assert_error!(of_three, SplitMismatch, second, "split.count", "found 3, expected 2");
    let unsplit = open(&[(first, part(0, 2, 2, "a")), (second, small_gguf().bytes())]).unwrap_err();
    assert_error!(unsplit, SplitMismatch, second, "found none, expected 2");
    let more = open(&[(first, part(0, 2, 3, "a")), (second, part(1, 2, 3, "b"))]).unwrap_err();
    assert_error!(more, SplitMismatch, "split.tensors.count", "found 3, expected 2");
    let twice = open(&[(first, part(0, 2, 2, "a")), (second, part(1, 2, 2, "a"))]).unwrap_err();
    assert_error!(twice, DuplicateTensor, second, "`a`");
    let number = Gguf::new().pair("split.count", U16, &2_u16.to_le_bytes()).bytes();
    assert_error!(refused(number), KeyMissing, "split.no", "found none");
    let many = Gguf::new().pair("split.count", U32, &u32s(&[1 << 20])).pair("split.no", U8, &[0]).bytes();
    assert_error!(refused(many), SplitMismatch, "split.count", "at most 65535");
}
