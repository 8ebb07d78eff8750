//! Valid GGUF files: what is read from other programs' files and from our own, and what is written.

mod encoder;

use std::path::Path;

use encoder::{Folder, small_gguf, small_safetensors};
use qwenkit_formats::gguf::{Array, Gguf, Metadata, SplitLimits, Strings, TensorSpec, Value, Writer};
use qwenkit_formats::{Error, ModelFiles};
use qwenkit_tensor::DType;

const FOREIGN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/formats/foreign.gguf");

fn bytes_of(model: &Gguf, name: &str) -> Vec<u8> {
    let tensor = model.tensor(name).unwrap();
    let mut bytes = vec![0; tensor.len_bytes];
    model.read(tensor, 0, &mut bytes).unwrap();
    bytes
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn a_file_of_the_python_package_is_read_in_full() {
    let model = Gguf::open(Path::new(FOREIGN)).unwrap();
    let m = model.metadata();
    assert_eq!((model.version(), m.string("general.architecture").unwrap()), (3, Some("qwen2")));
    let scalars: [(&str, Value); 12] = [
        ("t.u8", 200_u8.into()),
        ("t.i8", (-100_i8).into()),
        ("t.u16", 60000_u16.into()),
        ("t.i16", (-30000_i16).into()),
        ("t.u32", 4_000_000_000_u32.into()),
        ("t.i32", (-2_000_000_000_i32).into()),
        ("t.u64", u64::MAX.into()),
        ("t.i64", i64::MIN.into()),
        ("t.f32", 0.1_f32.into()),
        ("t.f64", 0.1_f64.into()),
        ("t.bool", true.into()),
        ("t.string", "Ġgrüße 你好".into()),
    ];
    for (key, value) in &scalars {
        assert_eq!(m.get(key), Some(value), "{key}");
    }
    assert_eq!(m.require_strings("t.strings").unwrap().iter().collect::<Vec<_>>(), ["a", "", "ä\n"]);
    assert_eq!(m.i32s("t.ints").unwrap(), Some(vec![1, -2, 3]));
    assert_eq!(m.f32s("t.floats").unwrap(), Some(vec![0.5, -1.5]));
    assert_eq!(m.bools("t.bools").unwrap(), Some(&[true, false, true][..]));
    let nested = Array::Array(vec![Array::I32(vec![1, 2]), Array::I32(vec![3])]);
    assert_eq!(m.get("t.nested"), Some(&Value::Array(nested)));

    let kinds: Vec<_> = model.tensors().iter().map(|t| (t.name.as_str(), t.dtype, t.shape.clone())).collect();
    let expected = [
        ("f32", DType::F32, vec![3, 64]),
        ("f16", DType::F16, vec![3, 64]),
        ("i32", DType::I32, vec![1, 2, 3]),
        ("q8_0", DType::Q8_0, vec![3, 64]),
        ("q4_0", DType::Q4_0, vec![3, 64]),
        ("bf16", DType::BF16, vec![3, 64]),
    ];
    assert_eq!(kinds, expected);
    assert!(model.tensors().iter().all(|t| t.offset % 64 == 0), "the file asks for alignment 64");
    let rows: Vec<f32> = (0..3 * 64).map(|i| i as f32 / 7.0 - 9.0).collect();
    assert_eq!(floats(&bytes_of(&model, "f32")), rows);
    let ints: Vec<u8> = (0..6_i32).flat_map(i32::to_le_bytes).collect();
    assert_eq!(bytes_of(&model, "i32"), ints);
}

#[test]
fn version_2_reads_as_version_3() {
    let folder = Folder::new();
    let old = Gguf::open(&folder.put("2.gguf", encoder::Gguf { version: 2, ..small_gguf() }.bytes())).unwrap();
    let new = Gguf::open(&folder.put("3.gguf", small_gguf().bytes())).unwrap();
    assert_eq!((old.version(), new.version()), (2, 3));
    assert_eq!(old.tensors(), new.tensors());
    assert!(old.metadata().iter().eq(new.metadata().iter()));
    assert_eq!(old.tensor("a").unwrap().shape, [2, 4]);
    assert_eq!(bytes_of(&old, "c"), (96..108).collect::<Vec<u8>>());
}

#[test]
fn ranges_are_read_by_many_threads_at_once() {
    let model = ModelFiles::open(Path::new(FOREIGN)).unwrap();
    let tensor = model.tensor("f32").unwrap();
    let mut whole = vec![0; tensor.len_bytes];
    model.read(tensor, 0, &mut whole).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (model, whole) = (&model, &whole);
            scope.spawn(move || {
                for start in (thread..whole.len()).step_by(4) {
                    let mut piece = vec![0; (whole.len() - start).min(33)];
                    model.read(tensor, start, &mut piece).unwrap();
                    assert_eq!(piece, whole[start..start + piece.len()]);
                }
            });
        }
    });
    assert!(model.read(tensor, tensor.len_bytes, &mut []).is_ok());
    assert_eq!(model.size_bytes(), std::fs::metadata(FOREIGN).unwrap().len());
}

/// One key of every value type and every array type.
fn every_value(path: &Path) -> Metadata {
    let mut m = Metadata::new(path);
    m.set("general.architecture", "qwen3");
    m.set("general.alignment", 64_u32);
    let scalars: [Value; 12] = [
        1_u8.into(),
        (-1_i8).into(),
        2_u16.into(),
        (-2_i16).into(),
        3_u32.into(),
        (-3_i32).into(),
        0.25_f32.into(),
        u64::MAX.into(),
        i64::MIN.into(),
        f64::MIN_POSITIVE.into(),
        false.into(),
        "tëxt".into(),
    ];
    let arrays = [
        Array::U8(vec![1, 255]),
        Array::I8(vec![-128]),
        Array::U16(vec![65535]),
        Array::I16(vec![-32768]),
        Array::U32(vec![u32::MAX]),
        Array::I32(vec![i32::MIN]),
        Array::F32(vec![f32::MIN_POSITIVE, -0.0]),
        Array::U64(vec![u64::MAX]),
        Array::I64(vec![i64::MIN]),
        Array::F64(vec![1e300]),
        Array::Bool(vec![true, false]),
        Array::String(["", "é", "\u{0}"].into_iter().collect()),
        Array::String(Strings::default()),
        Array::Array(vec![Array::U8(vec![]), Array::Array(vec![Array::String(["x"].into_iter().collect())])]),
    ];
    for (i, value) in scalars.into_iter().chain(arrays.map(Value::Array)).enumerate() {
        m.set(&format!("key.{i}"), value);
    }
    m
}

/// Two tensors of every type that GGUF has, with 1 to 4 axes, and data that tell them apart.
fn every_tensor() -> Vec<(TensorSpec, Vec<u8>)> {
    let plain = [DType::F8_E4M3, DType::F8_E5M2, DType::U64, DType::U32, DType::U16, DType::U8, DType::Bool];
    let kinds = DType::ALL.into_iter().filter(|t| !plain.contains(t));
    let shapes = |row: usize, i: usize| [vec![row], vec![3, row], vec![2, 1, row], vec![1, 2, 2, row]][i % 4].clone();
    let specs = kinds.enumerate().flat_map(|(i, dtype)| {
        [(0, dtype.block_len()), (1, 3 * dtype.block_len())].map(|(k, row)| TensorSpec {
            name: format!("{}.{k}", dtype.name()),
            dtype,
            shape: shapes(row, i + k),
        })
    });
    specs
        .enumerate()
        .map(|(i, spec)| {
            let len = spec.dtype.tensor_bytes(&spec.shape).unwrap();
            let data = (0..len).map(|b| (b * 7 + i * 31) as u8).collect();
            (spec, data)
        })
        .collect()
}

fn write_all(mut writer: Writer, tensors: &[(TensorSpec, Vec<u8>)]) -> Vec<std::path::PathBuf> {
    for (spec, data) in tensors {
        // In two pieces, the first of them short.
        let (a, b) = data.split_at(data.len().min(5));
        writer.write(&spec.name, a).unwrap();
        if !b.is_empty() {
            writer.write(&spec.name, b).unwrap();
        }
    }
    writer.finish().unwrap()
}

fn assert_holds(model: &Gguf, tensors: &[(TensorSpec, Vec<u8>)]) {
    assert_eq!(model.tensors().len(), tensors.len());
    for (found, (spec, data)) in model.tensors().iter().zip(tensors) {
        assert_eq!((&found.name, found.dtype, &found.shape), (&spec.name, spec.dtype, &spec.shape));
        assert_eq!(&bytes_of(model, &spec.name), data, "{}", spec.name);
    }
}

#[test]
fn every_value_and_tensor_type_survives_writing_and_reading() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let (metadata, tensors) = (every_value(&path), every_tensor());
    assert_eq!(tensors.len(), 40);
    let specs: Vec<_> = tensors.iter().map(|t| t.0.clone()).collect();
    let written = write_all(Writer::create(&path, &metadata, &specs).unwrap(), &tensors);
    assert_eq!((written, folder.names()), (vec![path.clone()], vec!["m.gguf".to_owned()]));
    let model = Gguf::open(&path).unwrap();
    assert!(model.metadata().iter().eq(metadata.iter()));
    assert_holds(&model, &tensors);
    assert!(model.tensors().iter().all(|t| t.offset % 64 == 0));
}

#[test]
fn a_file_of_the_python_package_is_written_again_byte_for_byte() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let model = Gguf::open(Path::new(FOREIGN)).unwrap();
    let tensors: Vec<(TensorSpec, Vec<u8>)> =
        model.tensors().iter().map(|t| (spec(&t.name, t.dtype, &t.shape), bytes_of(&model, &t.name))).collect();
    let specs: Vec<_> = tensors.iter().map(|t| t.0.clone()).collect();
    write_all(Writer::create(&path, model.metadata(), &specs).unwrap(), &tensors);
    assert!(std::fs::read(&path).unwrap() == std::fs::read(FOREIGN).unwrap());
}

#[test]
fn a_split_set_opens_from_any_part_and_can_be_joined() {
    let folder = Folder::new();
    let path = folder.path().join("m.v1.gguf");
    let (metadata, tensors) = (every_value(&path), every_tensor());
    let specs: Vec<_> = tensors.iter().map(|t| t.0.clone()).collect();
    let limits = SplitLimits { max_tensors: Some(15), max_bytes: None };
    let parts = write_all(Writer::create_split(&path, &metadata, &specs, limits).unwrap(), &tensors);
    let names = ["m.v1-00001-of-00003.gguf", "m.v1-00002-of-00003.gguf", "m.v1-00003-of-00003.gguf"];
    assert_eq!(folder.names(), names);
    for part in &parts {
        let model = Gguf::open(part).unwrap();
        assert_eq!((model.path(), model.parts().len()), (parts[0].as_path(), 3));
        assert_holds(&model, &tensors);
        assert_eq!(model.tensors()[39].part, 2);
        assert_eq!(model.metadata().u64("split.tensors.count").unwrap(), Some(40));
        assert_eq!(model.metadata().get("key.0"), Some(&Value::U8(1)));
        let bytes: u64 = parts.iter().map(|p| std::fs::metadata(p).unwrap().len()).sum();
        assert_eq!(model.size_bytes(), bytes);
    }
    let by_folder = ModelFiles::open(folder.path()).unwrap();
    assert_eq!((by_folder.path(), by_folder.tensors().len()), (parts[0].as_path(), 40));

    let joined = folder.path().join("joined.gguf");
    let from_parts = Gguf::open(&parts[1]).unwrap();
    write_all(Writer::create(&joined, from_parts.metadata(), &specs).unwrap(), &tensors);
    let joined = Gguf::open(&joined).unwrap();
    assert!(joined.metadata().iter().eq(metadata.iter()), "the keys of the split must be gone");
    assert_holds(&joined, &tensors);
}

#[test]
fn limits_by_bytes_and_sets_of_one_part() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let tensors = every_tensor();
    let specs: Vec<_> = tensors.iter().map(|t| t.0.clone()).collect();
    let metadata = Metadata::new(&path);
    let one = SplitLimits { max_bytes: Some(1 << 30), max_tensors: None };
    write_all(Writer::create_split(&path, &metadata, &specs, one).unwrap(), &tensors);
    assert_eq!(folder.names(), ["m.gguf"]);
    assert_eq!(Gguf::open(&path).unwrap().metadata().u64("split.count").unwrap(), None);
    let many = SplitLimits { max_bytes: Some(2000), max_tensors: None };
    let parts = write_all(Writer::create_split(&path, &metadata, &specs, many).unwrap(), &tensors);
    assert!(parts.len() > 3);
    let model = Gguf::open(&parts[0]).unwrap();
    assert_holds(&model, &tensors);
    for part in 0..parts.len() {
        let held: Vec<_> = model.tensors().iter().filter(|t| t.part == part).map(|t| t.len_bytes).collect();
        assert!(held.iter().sum::<usize>() <= 2000 || held.len() == 1, "part {part}: {held:?}");
    }
}

#[test]
fn a_vocabulary_without_tensors_is_a_valid_file() {
    let folder = Folder::new();
    let path = folder.path().join("vocab.gguf");
    Writer::create(&path, &every_value(&path), &[]).unwrap().finish().unwrap();
    assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 0);
}

fn spec(name: &str, dtype: DType, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
}

fn refused(specs: &[TensorSpec]) -> Error {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let error = Writer::create(&path, &Metadata::new(&path), specs).err().expect("refused");
    assert!(folder.names().is_empty(), "nothing may be written");
    error
}

#[test]
fn what_gguf_cannot_hold_is_refused_before_writing() {
    let long = "x".repeat(64);
    assert_error!(refused(&[spec(&long, DType::F32, &[1])]), WriteInvalid, "m.gguf", "name of 64 bytes", "at most 63");
    assert_error!(refused(&[spec("x", DType::F8_E4M3, &[1])]), WriteInvalid, "`x`", "F8_E4M3", "one of F32");
    assert_error!(refused(&[spec("x", DType::Q4_K, &[2, 128])]), WriteInvalid, "[2, 128] of Q4_K", "multiple of 256");
    assert_error!(refused(&[spec("x", DType::F32, &[1; 5])]), WriteInvalid, "at most 4 axes");
    assert_error!(refused(&[spec("x", DType::F32, &[0])]), WriteInvalid, "none empty");
    let huge = 1 << 62;
    assert_error!(refused(&[spec("x", DType::I8, &[huge]), spec("y", DType::I8, &[huge])]), WriteInvalid, "2^63");
    assert_error!(refused(&[spec("x", DType::F32, &[1]), spec("x", DType::F32, &[1])]), DuplicateTensor, "`x`");
    let mut metadata = Metadata::new(Path::new("m.gguf"));
    metadata.set("general.alignment", 1_u64 << 63);
    assert_error!(Writer::create(Path::new("m.gguf"), &metadata, &[]).err().unwrap(), Alignment, "m.gguf", "1048576");
}

#[test]
fn data_out_of_order_or_of_wrong_length_are_refused_and_leave_nothing() {
    let folder = Folder::new();
    let path = folder.path().join("m.gguf");
    let specs = [spec("a", DType::F32, &[2]), spec("b", DType::F32, &[1])];
    let new = || Writer::create(&path, &Metadata::new(&path), &specs).unwrap();
    assert_error!(new().write("b", &[0; 4]).unwrap_err(), WriteOrder, "m.gguf", "`b`", "tensor `a` (byte 0 of 8)");
    assert_error!(new().write("a", &[0; 9]).unwrap_err(), WriteLength, "`a`", "got 9 bytes", "expected 8");
    let mut short = new();
    short.write("a", &[0; 8]).unwrap();
    short.write("b", &[0; 3]).unwrap();
    assert_error!(short.finish().unwrap_err(), WriteLength, "`b`", "got 3 bytes", "expected 4");
    let mut complete = new();
    complete.write("a", &[0; 8]).unwrap();
    complete.write("b", &[0; 4]).unwrap();
    assert_error!(complete.write("b", &[0]).unwrap_err(), WriteOrder, "the end of the model");
    drop(complete);
    assert!(folder.names().is_empty());
}

#[test]
fn a_folder_that_is_not_there_is_an_error() {
    let path = Path::new("/nonexistent/folder/m.gguf");
    assert_error!(Writer::create(path, &Metadata::new(path), &[]).err().unwrap(), Io, "cannot create", "m.gguf");
}

#[test]
fn a_safetensors_file_is_not_taken_for_gguf() {
    let folder = Folder::new();
    let error = ModelFiles::open(&folder.put("model.safetensors", small_safetensors())).unwrap_err();
    assert_error!(error, WrongKind, "a safetensors file", "checkpoint folder");
}
