//! What every hostile test asks: the model is refused, in words that name the file, the thing, what was found and what was
//! expected.

use std::path::Path;

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Model, Plan, arch};

use crate::tiny::Tiny;

/// The two forms in which a model can lie on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Gguf,
    Checkpoint,
}

pub(crate) const FORMS: [Form; 2] = [Form::Gguf, Form::Checkpoint];

/// Opens and loads `path`; its message if it is refused.
pub(crate) fn refused(path: &Path) -> Result<(), String> {
    let files = ModelFiles::open(path).map_err(|e| e.to_string())?;
    let compute = Compute::new(1, Isa::Portable);
    Model::load(&files, &compute, &mut |_| {}).map(drop).map_err(|e| e.to_string())
}

/// Writes `tiny` in `form` and loads it; its message, without the folder's own name, if it is refused.
pub(crate) fn outcome(tiny: &Tiny, form: Form) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = match form {
        Form::Gguf => folder.path().join("model.gguf"),
        Form::Checkpoint => folder.path().to_owned(),
    };
    match form {
        Form::Gguf => tiny.write_gguf(&path),
        Form::Checkpoint => tiny.write_checkpoint(&path),
    }
    let result = refused(&path);
    result.map_err(|message| {
        let named = path.display().to_string();
        assert!(message.contains(&named), "the message does not name `{named}`: {message}");
        message.replace(&named, "MODEL")
    })
}

/// The plan of `tiny` written in `form`.
pub(crate) fn planned(tiny: &Tiny, form: Form) -> Plan {
    let folder = tempfile::tempdir().unwrap();
    let path = match form {
        Form::Gguf => folder.path().join("model.gguf"),
        Form::Checkpoint => folder.path().to_owned(),
    };
    match form {
        Form::Gguf => tiny.write_gguf(&path),
        Form::Checkpoint => tiny.write_checkpoint(&path),
    }
    arch::plan(&ModelFiles::open(&path).unwrap()).unwrap()
}

/// Demands that `tiny` is refused with a message that has all of `parts`.
pub(crate) fn assert_refused(tiny: &Tiny, form: Form, parts: &[&str], what: &str) {
    match outcome(tiny, form) {
        Ok(()) => panic!("{what} as {form:?}: accepted"),
        Err(message) => {
            for part in parts {
                assert!(message.contains(part), "{what} as {form:?}: `{part}` is not in: {message}");
            }
        }
    }
}
