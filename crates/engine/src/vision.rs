//! Images of requests: what they are, where they stand in a prompt, and by what the tree of pages tells them apart.
//!
//! An image stands in a prompt as a run of placeholder tokens, one for each of its vectors. Placeholders are all the same
//! token, so for the tree of pages each has a key made of its image's content and its own number in it: prompts that differ in
//! an image share no page behind where it begins.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use qwenkit_kernels::Compute;
use qwenkit_models::{Grid, Pixels, Plan, Positions, SeenRows, Sight, Span, Tower, TowerBuffers, VisionPlan};
use qwenkit_tensor::TokenId;
use sha2::{Digest as _, Sha256};

use crate::{error::Error, pages::Key};

/// An image or a film, as patches, with a name made of its content.
#[derive(Clone, Debug)]
pub struct Visual {
    pixels: Arc<Pixels>,
    kind: VisualKind,
    digest: Digest,
}

/// What a visual is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum VisualKind {
    /// An image.
    Image,
    /// A film, whose steps are so many seconds apart.
    Film {
        /// Seconds from one step of the grid to the next, `second_per_grid_ts`.
        seconds_per_step: f32,
    },
}

/// A name made of content: equal only for what is equal.
pub(crate) type Digest = [u8; 32];

/// A visual and where it begins in a prompt.
#[derive(Clone, Debug)]
pub struct Placed {
    /// What stands there.
    pub visual: Visual,
    /// Its first placeholder.
    pub start: usize,
}

/// What an engine knows of its model's tower.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionInfo {
    /// The tower's shape.
    pub plan: VisionPlan,
    /// The placeholder of images.
    pub image_token: TokenId,
    /// The placeholder of films.
    pub video_token: TokenId,
}

impl Visual {
    /// A visual of these patches.
    pub fn new(pixels: Pixels, kind: VisualKind) -> Visual {
        let mut hasher = Sha256::new();
        let Grid { steps, rows, cols } = pixels.grid;
        for number in [steps, rows, cols] {
            hasher.update((number as u64).to_le_bytes());
        }
        let seconds = match kind {
            VisualKind::Image => f32::NAN,
            VisualKind::Film { seconds_per_step } => seconds_per_step,
        };
        hasher.update(seconds.to_le_bytes());
        let mut bytes = Vec::with_capacity(1 << 14);
        for values in pixels.values.chunks(1 << 12) {
            bytes.clear();
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            hasher.update(&bytes);
        }
        Visual { digest: hasher.finalize().into(), pixels: Arc::new(pixels), kind }
    }

    /// An image of these patches.
    pub fn image(pixels: Pixels) -> Visual {
        Visual::new(pixels, VisualKind::Image)
    }

    /// Its patches.
    pub fn pixels(&self) -> &Pixels {
        &self.pixels
    }

    /// What it is.
    pub fn kind(&self) -> VisualKind {
        self.kind
    }

    pub(crate) fn digest(&self) -> &Digest {
        &self.digest
    }

    /// What the tree of pages takes its vector `i` for.
    pub(crate) fn key(&self, i: usize) -> Key {
        let hash = Sha256::new().chain_update(self.digest).chain_update((i as u64).to_le_bytes()).finalize();
        Key::of_vector(hash.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }
}

impl VisionInfo {
    /// Of a text model and its tower; `None` for a model that reads text only.
    pub fn of(text: &Plan, tower: &Tower) -> Option<VisionInfo> {
        let Sight { image_token, video_token, .. } = *text.sight.as_ref()?;
        Some(VisionInfo { plan: tower.plan().clone(), image_token, video_token })
    }

    /// Placeholders that a visual takes.
    pub fn tokens(&self, visual: &Visual) -> usize {
        visual.pixels.tokens(&self.plan.patch)
    }

    fn is_placeholder(&self, id: TokenId) -> bool {
        id == self.image_token || id == self.video_token
    }

    /// Visuals of an image's or a film's patches: one, or for models that are told the time before each step of a film, one for
    /// each step.
    ///
    /// # Errors
    /// When the patches are none of this tower's.
    pub fn visuals(&self, pixels: Pixels, kind: VisualKind) -> Result<Vec<Visual>, Error> {
        pixels.check(&self.plan)?;
        if !self.plan.films_by_step || pixels.grid.steps == 1 {
            return Ok(vec![Visual::new(pixels, kind)]);
        }
        let grid = Grid { steps: 1, ..pixels.grid };
        let step = pixels.values.len() / pixels.grid.steps;
        let visual = |values: &[f32]| Visual::new(Pixels { values: values.to_vec(), grid }, kind);
        Ok(pixels.values.chunks_exact(step).map(visual).collect())
    }

    /// Replaces each placeholder of `ids` by as many as its visual has vectors; what a chat template writes becomes what the
    /// model reads. Placeholders of images take the images in their order, those of films the films. Says where each visual
    /// begins.
    ///
    /// # Errors
    /// When there are more or fewer placeholders than visuals.
    pub fn expand(&self, ids: &[TokenId], visuals: Vec<Visual>) -> Result<(Vec<TokenId>, Vec<Placed>), Error> {
        let found = ids.iter().filter(|id| self.is_placeholder(**id)).count();
        let error = Error::Placeholders { found, expected: format!("{}, one for each image", visuals.len()) };
        let (mut expanded, mut placed) = (Vec::with_capacity(ids.len()), Vec::with_capacity(visuals.len()));
        let mut left = self.queues(visuals);
        for &id in ids {
            if !self.is_placeholder(id) {
                expanded.push(id);
                continue;
            }
            let Some(visual) = left[self.queue_of(id)].pop_front() else { return Err(error) };
            let start = expanded.len();
            expanded.resize(start + self.tokens(&visual), id);
            placed.push(Placed { visual, start });
        }
        if left.iter().any(|queue| !queue.is_empty()) { Err(error) } else { Ok((expanded, placed)) }
    }

    /// Says where each visual begins in `ids`, which have a placeholder for each vector already.
    ///
    /// # Errors
    /// When there are more or fewer placeholders than the visuals have vectors, or they stand in other runs.
    pub fn place(&self, ids: &[TokenId], visuals: Vec<Visual>) -> Result<Vec<Placed>, Error> {
        let wanted: Vec<usize> = visuals.iter().map(|v| self.tokens(v)).collect();
        let error = || self.misplaced(ids, &wanted);
        let mut left = self.queues(visuals);
        let (mut at, mut placed) = (0, Vec::new());
        while let Some(start) = (at..ids.len()).find(|&i| self.is_placeholder(ids[i])) {
            let visual = left[self.queue_of(ids[start])].pop_front().ok_or_else(error)?;
            at = start + self.tokens(&visual);
            if !ids.get(start..at).is_some_and(|run| run.iter().all(|id| *id == ids[start])) {
                return Err(error());
            }
            placed.push(Placed { visual, start });
        }
        if left.iter().any(|queue| !queue.is_empty()) { Err(error()) } else { Ok(placed) }
    }

    /// The refusal of `ids` whose placeholders do not stand in runs of these lengths.
    fn misplaced(&self, ids: &[TokenId], wanted: &[usize]) -> Error {
        let runs = ids.chunk_by(|a, b| a == b).filter(|run| self.is_placeholder(run[0]));
        let found: Vec<usize> = runs.map(<[_]>::len).collect();
        let expected = format!(
            "{} in runs of {}, found runs of {}\n\
             hint: each image has one run, as long as its grid is large, and they come in the order of the images; \
             take prompt, patches and grids from one call of the processor",
            wanted.iter().sum::<usize>(),
            told(wanted),
            told(&found)
        );
        Error::Placeholders { found: found.iter().sum(), expected }
    }

    /// Images and films apart, in their order.
    fn queues(&self, visuals: Vec<Visual>) -> [VecDeque<Visual>; 2] {
        let mut queues = [VecDeque::new(), VecDeque::new()];
        for visual in visuals {
            let token = match visual.kind {
                VisualKind::Image => self.image_token,
                VisualKind::Film { .. } => self.video_token,
            };
            queues[self.queue_of(token)].push_back(visual);
        }
        queues
    }

    fn queue_of(&self, token: TokenId) -> usize {
        usize::from(token != self.image_token)
    }

    /// Refuses visuals that are none of this tower's, or do not stand on placeholders, in order.
    pub(crate) fn check(&self, ids: &[TokenId], placed: &[Placed]) -> Result<(), Error> {
        let mut at = 0;
        for Placed { visual, start } in placed {
            visual.pixels.check(&self.plan)?;
            let end = start.saturating_add(self.tokens(visual));
            let stands =
                *start >= at && ids.get(*start..end).is_some_and(|run| run.iter().all(|&id| self.is_placeholder(id)));
            if !stands {
                let expected = format!("{} behind each other from token {start}", self.tokens(visual));
                return Err(Error::Placeholders { found: 0, expected });
            }
            at = end;
        }
        Ok(())
    }

    fn interval(&self, kind: VisualKind) -> f32 {
        match (kind, self.plan.positions_per_second) {
            (VisualKind::Film { seconds_per_step }, Some(per_second)) => per_second * seconds_per_step,
            _ => 1.0,
        }
    }
}

/// The first of some numbers, in words.
fn told(numbers: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> = numbers.iter().take(SHOWN).map(usize::to_string).collect();
    match (numbers.len(), shown.join(", ")) {
        (0, _) => "none".to_owned(),
        (..=SHOWN, shown) => shown,
        (count, shown) => format!("{shown}, ... ({count} in all)"),
    }
}

/// The visuals of one sequence, on their way to vectors.
pub struct View {
    items: Vec<Item>,
    positions: Positions,
}

/// One visual of a sequence.
pub(crate) struct Item {
    pub(crate) visual: Visual,
    /// Its tokens.
    pub(crate) tokens: Range<usize>,
    /// (tokens, 1 + S, D), once they are computed and until the sequence is behind them.
    pub(crate) vectors: Option<Arc<Vec<f32>>>,
}

impl View {
    /// The visuals of a prompt, all of them computed.
    ///
    /// # Errors
    /// When one is none of this tower's, or does not stand on placeholders.
    pub fn computed(
        info: &VisionInfo,
        tower: &Tower,
        compute: &Compute,
        ids: &[TokenId],
        placed: Vec<Placed>,
    ) -> Result<View, Error> {
        info.check(ids, &placed)?;
        let mut view = View::new(info, ids.len(), placed);
        let mut buffers = TowerBuffers::default();
        for item in &mut view.items {
            item.vectors = Some(Arc::new(tower.encode(compute, &mut buffers, item.visual.pixels())?));
        }
        Ok(view)
    }

    /// Rotary positions of tokens `range`, which may lie behind the prompt.
    pub(crate) fn positions(&self, range: Range<usize>) -> Vec<[u32; 3]> {
        range.map(|i| self.positions.at(i)).collect()
    }

    /// Of a prompt of `prompt_tokens`, checked.
    pub(crate) fn new(info: &VisionInfo, prompt_tokens: usize, placed: Vec<Placed>) -> View {
        let mut spans = Vec::with_capacity(placed.len());
        let mut items = Vec::with_capacity(placed.len());
        for Placed { visual, start } in placed {
            let tokens = start..start + info.tokens(&visual);
            let grid = visual.pixels.grid.merged(&info.plan.patch);
            spans.push(Span { tokens: tokens.clone(), grid, interval: info.interval(visual.kind) });
            items.push(Item { visual, tokens, vectors: None });
        }
        View { items, positions: Positions::new(prompt_tokens, &spans) }
    }

    /// Replaces the keys of placeholders by their own.
    pub(crate) fn mark(&self, keys: &mut [Key]) {
        for item in &self.items {
            for (i, at) in item.tokens.clone().enumerate() {
                keys[at] = item.visual.key(i);
            }
        }
    }

    /// Tokens from `computed` on that can be computed before an image's vectors are missed, of `wanted`.
    pub(crate) fn seen_ahead(&self, computed: usize, wanted: usize) -> usize {
        let missing = self.items.iter().find(|item| item.vectors.is_none() && item.tokens.end > computed);
        missing.map_or(wanted, |item| item.tokens.start.saturating_sub(computed).min(wanted))
    }

    /// The image whose vectors are missed at token `computed`.
    pub(crate) fn missed(&mut self, computed: usize) -> Option<&mut Item> {
        self.items.iter_mut().find(|item| item.vectors.is_none() && item.tokens.contains(&computed))
    }

    /// Forgets vectors of images that are behind.
    pub(crate) fn forget_before(&mut self, computed: usize) {
        for item in self.items.iter_mut().filter(|item| item.tokens.end <= computed) {
            item.vectors = None;
        }
    }

    /// Images in tokens `range`: rows counted from the first, and their vectors.
    pub(crate) fn rows(&self, range: Range<usize>) -> Vec<SeenRows<'_>> {
        let mut found = Vec::new();
        for item in &self.items {
            let (start, end) = (item.tokens.start.max(range.start), item.tokens.end.min(range.end));
            if let (true, Some(vectors)) = (start < end, &item.vectors) {
                let each = vectors.len() / item.tokens.len();
                let values = &vectors[(start - item.tokens.start) * each..(end - item.tokens.start) * each];
                found.push(SeenRows { rows: start - range.start..end - range.start, values });
            }
        }
        found
    }
}
