//! Taps: named places where somebody may look at, or change, what flows through the model.
//!
//! Calibration, lenses, steering and golden tests attach here. With nothing attached a tap costs one branch.

/// A place in the forward pass. Layers number from 0; places outside the layers have layer 0. Where a model has S residual
/// streams, the embeddings and the residual are (T, S D).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Token embeddings: (T, D)
    Embedding,
    /// Normed input of the mixer: (T, D)
    MixerInput,
    /// Queries after norm and rotation: (T, H, K)
    Query,
    /// Keys after norm and rotation: (T, G, K)
    Key,
    /// Values: (T, G, K)
    Value,
    /// Heads' results before the output projection, gated where there is a gate: (T, H, K)
    Heads,
    /// The residual stream after the mixer: (T, D)
    ResidualMiddle,
    /// Normed input of the feed-forward block: (T, D)
    FfnInput,
    /// Gated activations before the down projection: (T, F); of a mixture, those of its shared expert
    FfnHidden,
    /// A router's logits: (T, E)
    Router,
    /// The residual stream after the layer: (T, D)
    Residual,
    /// Normed input of the output head, for the rows that want logits: (rows, D)
    HeadInput,
}

/// What is called at every site with the site, the layer and its values, which it may change.
pub type Tap<'a> = dyn FnMut(Site, usize, &mut [f32]) + 'a;

/// Calls the tap, if there is one.
pub(crate) fn visit(tap: &mut Option<&mut Tap<'_>>, site: Site, layer: usize, x: &mut [f32]) {
    if let Some(tap) = tap {
        tap(site, layer, x);
    }
}
