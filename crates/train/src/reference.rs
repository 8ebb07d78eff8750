//! By how much the better of each two answers leads before a run of preferences changes anything. A run measures it once, keeps it
//! beside its checkpoint as far as it has come, and does not measure again when it goes on.

use std::{collections::BTreeMap, path::Path};

use qwenkit_formats::{read_safetensors_file, write_safetensors};
use qwenkit_tensor::DType;

use crate::{
    error::Error,
    example::Example,
    learner::{Learner, pieces},
};

/// The tensor of the file.
const LEADS: &str = "leads";
/// Pairs between two times that what is measured is kept.
const KEPT_EVERY: usize = 256;

/// The leads of pairs of answers, which lie side by side, under what the learner holds. They are kept in `path`, for the run
/// `identity`; what is there of this run already is not measured again. `tell` hears how many pairs are done, and says whether to
/// go on. Ranks share the work; the first one reads and writes the file.
///
/// # Errors
/// When the model cannot be computed, the file cannot be written, `tell` stops it, or another rank cannot go on.
pub fn references(
    learner: &mut Learner<'_>,
    answers: &[Example],
    piece_tokens: usize,
    (path, identity): (&Path, &str),
    tell: &mut dyn FnMut(usize) -> bool,
) -> Result<Vec<f64>, Error> {
    let team = learner.team;
    team.agree(identity)?;
    let pairs: Vec<&[Example; 2]> = answers.as_chunks().0.iter().collect();
    // What the first rank finds there is what all know.
    let mut leads = team.join(&if team.is_first() { read(path, identity) } else { Vec::new() })?;
    leads.truncate(pairs.len());
    let mut kept = leads.len();
    let mut goes_on = team.all(kept == pairs.len() || tell(kept))?;
    let len = |pair: &&[Example; 2]| pair.iter().map(|answer| answer.ids.len()).sum();
    let pieces: Vec<_> = pieces(&pairs[kept..], piece_tokens, len).collect();
    // Each rank measures one piece, then all know all of them.
    for pieces in pieces.chunks(team.count()) {
        if goes_on {
            let own = pieces.get(team.rank()).copied().unwrap_or_default();
            let answers: Vec<&Example> = own.iter().flat_map(|pair| pair.iter()).collect();
            let own = learner.leads(&answers, piece_tokens)?;
            leads.extend(team.join(&own)?);
            goes_on = team.all(tell(leads.len()))?;
        }
        if leads.len() - kept >= KEPT_EVERY || !goes_on || leads.len() == pairs.len() {
            if team.is_first() {
                write(path, identity, &leads)?;
            }
            kept = leads.len();
        }
        if !goes_on && kept < pairs.len() {
            return Err(Error::StoppedBefore { done: kept, pairs: pairs.len() });
        }
    }
    Ok(leads)
}

/// What is there of this run: nothing of another one or of a file that is not whole, which only costs measuring again.
fn read(path: &Path, identity: &str) -> Vec<f64> {
    let leads = || {
        let file = read_safetensors_file(path).ok()?;
        let info = file.tensor(LEADS).filter(|info| info.dtype == DType::F64)?;
        let mut bytes = vec![0; info.len_bytes];
        file.read(info, 0, &mut bytes).ok()?;
        let is_own = file.metadata().get("identity").is_some_and(|found| found == identity);
        is_own.then(|| bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
    };
    leads().unwrap_or_default()
}

fn write(path: &Path, identity: &str, leads: &[f64]) -> Result<(), Error> {
    let bytes: Vec<u8> = leads.iter().flat_map(|lead| lead.to_le_bytes()).collect();
    let remarks = BTreeMap::from([("identity".to_owned(), identity.to_owned())]);
    Ok(write_safetensors(path, &[(LEADS, DType::F64, &[leads.len()], &bytes)], &remarks)?)
}
