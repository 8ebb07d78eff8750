//! However absurd the numbers in a header, opening a file allocates no more than a small multiple of the file's size.
//!
//! One test alone in its process: the counting allocator sees every thread.

mod encoder;

use std::path::Path;

use encoder::*;
use peak_alloc::PeakAlloc;
use qwenkit_formats::{Gguf as Opened, read_safetensors_file};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// The most that was allocated at one time while `open` ran, beyond what was before.
fn peak_bytes(open: impl FnOnce()) -> usize {
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    open();
    ALLOCATED.peak_usage().saturating_sub(before)
}

/// `fixed` bytes for paths, messages and the like, and `times` the file.
fn assert_bounded(path: &Path, bytes: &[u8], times: usize, open: impl Fn(&Path)) {
    std::fs::write(path, bytes).unwrap();
    let fixed = 8 << 10;
    let peak = peak_bytes(|| open(path));
    assert!(peak <= fixed + times * bytes.len(), "{peak} bytes for a file of {} bytes", bytes.len());
}

#[test]
fn absurd_numbers_allocate_nothing() {
    let folder = Folder::new();
    let (gguf, other) = (folder.path().join("m.gguf"), folder.path().join("m.safetensors"));
    let open_gguf = |path: &Path| drop(Opened::open(path));
    let open_other = |path: &Path| drop(read_safetensors_file(path));
    let numbers: Vec<u64> = (0..64).step_by(7).flat_map(|bit| [1_u64 << bit, (1_u64 << bit).wrapping_neg()]).collect();

    // Every place of a small header, overwritten by every absurd number.
    let whole = small_gguf().bytes();
    for at in 4..small_gguf().header().len() - 8 {
        for number in &numbers {
            let mut bytes = whole.clone();
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            assert_bounded(&gguf, &bytes, 8, open_gguf);
        }
    }
    let whole = small_safetensors();
    for number in &numbers {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        assert_bounded(&other, &bytes, 8, open_other);
    }

    // Large files: counts that the file could just hold, before contents that break at once or fill it.
    let size = 4 << 20;
    let filled = |pair_kind, value: Vec<u8>| Gguf::new().pair("k", pair_kind, &value).bytes();
    for element in [U8, I16, F32, F64, BOOL] {
        let width = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][element as usize];
        let bytes = filled(ARRAY, array(element, (size / width) as u64, &vec![0; size]));
        assert_bounded(&gguf, &bytes, 2, open_gguf);
    }
    assert_bounded(&gguf, &filled(STRING, string(vec![b'x'; size])), 2, open_gguf);
    let empty_strings = filled(ARRAY, array(STRING, (size / 8) as u64, &vec![0; size]));
    assert_bounded(&gguf, &empty_strings, 2, open_gguf);
    let short_strings = string("x").repeat(size / 9);
    assert_bounded(&gguf, &filled(ARRAY, array(STRING, (size / 9) as u64, &short_strings)), 2, open_gguf);
    let one_long = [vec![0; size / 2], string(vec![b'x'; size / 2])].concat();
    assert_bounded(&gguf, &filled(ARRAY, array(STRING, (size / 16 + 1) as u64, &one_long)), 3, open_gguf);
    let arrays = array(U8, 0, &[]).repeat(size / 12);
    assert_bounded(&gguf, &filled(ARRAY, array(ARRAY, (size / 12) as u64, &arrays)), 10, open_gguf);

    // Counts that the size of the file allows, in front of nothing that they could count.
    let pairs = Gguf { pair_count: Some(1 << 16), ..Gguf::new() }.data(size).bytes();
    assert_bounded(&gguf, &pairs, 2, open_gguf);
    let tensors = Gguf { tensor_count: Some((size / 24) as u64), ..Gguf::new() }.data(size).bytes();
    assert_bounded(&gguf, &tensors, 2, open_gguf);

    // As many of the shortest entries as there may be.
    let shortest = (0..1_u32 << 16).fold(Gguf::new(), |file, i| file.pair(format!("{i:x}"), U8, &[0]));
    assert_bounded(&gguf, &shortest.bytes(), 16, open_gguf);
    let names: Vec<String> = (0..20_000_u32).map(|i| i.to_string()).collect();
    let entries = names.iter().zip(0..).fold(Gguf::new(), |file, (name, i)| file.tensor(name, &[1], 24, 32 * i));
    assert_bounded(&gguf, &entries.data(20_000 * 32).bytes(), 8, open_gguf);

    // JSON at its most wasteful: a header of nothing but axes, and one of the shortest tensors.
    let axes = format!(r#"{{"x":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(size / 8));
    assert_bounded(&other, &safetensors(&axes, 1), 16, open_other);
    let entry = |name: &String| format!(r#""{name}":{{"dtype":"U8","shape":[],"data_offsets":[0,0]}}"#);
    let empty = names.iter().map(entry).collect::<Vec<_>>().join(",");
    assert_bounded(&other, &safetensors(&format!("{{{empty}}}"), 0), 16, open_other);
}
