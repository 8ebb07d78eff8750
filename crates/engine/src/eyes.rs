//! The tower of an engine at work: images become vectors piece by piece, and the vectors of the last ones are remembered.

use std::sync::Arc;

use qwenkit_kernels::Compute;
use qwenkit_models::{Encoding, Tower, TowerBuffers};

use crate::{
    error::Error,
    vision::{Digest, VisionInfo, Visual},
};

/// Vectors that are remembered, in bytes: those of a conversation's images, so that a turn whose pages were given up does not
/// look at them again.
const REMEMBERED_BYTES: usize = 128 << 20;
/// Images begun and not through. More than one only where somebody of higher priority came between.
const BEGUN_MAX: usize = 4;

/// A tower with its memory.
pub(crate) struct Eyes {
    tower: Tower,
    info: VisionInfo,
    buffers: TowerBuffers,
    begun: Vec<(Digest, Encoding)>,
    /// The last used last.
    seen: Vec<(Digest, Arc<Vec<f32>>)>,
}

impl Eyes {
    pub(crate) fn new(tower: Tower, info: VisionInfo) -> Eyes {
        Eyes { tower, info, buffers: TowerBuffers::default(), begun: Vec::new(), seen: Vec::new() }
    }

    pub(crate) fn info(&self) -> &VisionInfo {
        &self.info
    }

    pub(crate) fn weight_bytes(&self) -> usize {
        self.tower.weight_bytes()
    }

    /// The visual's vectors, if they are there; else computes one more of the tower's blocks.
    pub(crate) fn look(&mut self, compute: &Compute, visual: &Visual) -> Result<Option<Arc<Vec<f32>>>, Error> {
        if let Some(i) = self.seen.iter().position(|(digest, _)| digest == visual.digest()) {
            let found = self.seen.remove(i);
            let vectors = Arc::clone(&found.1);
            self.seen.push(found);
            return Ok(Some(vectors));
        }
        let begun = self.begun.iter().position(|(digest, _)| digest == visual.digest());
        let (digest, mut encoding) = match begun {
            Some(i) => self.begun.remove(i),
            None => {
                let encoding = self.tower.begin(compute, &mut self.buffers, visual.pixels())?;
                (*visual.digest(), encoding)
            }
        };
        if !self.tower.advance(compute, &mut self.buffers, &mut encoding)? {
            if self.begun.len() == BEGUN_MAX {
                self.begun.remove(0);
            }
            self.begun.push((digest, encoding));
            return Ok(None);
        }
        let vectors = Arc::new(encoding.into_vectors());
        self.seen.push((digest, Arc::clone(&vectors)));
        let bytes =
            |seen: &[(Digest, Arc<Vec<f32>>)]| seen.iter().map(|(_, v)| v.len() * size_of::<f32>()).sum::<usize>();
        while self.seen.len() > 1 && bytes(&self.seen) > REMEMBERED_BYTES {
            self.seen.remove(0);
        }
        Ok(Some(vectors))
    }
}
