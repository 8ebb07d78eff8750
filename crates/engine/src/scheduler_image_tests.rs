//! The scheduler with images in prompts: a prompt's answer depends on what its images are and where they stand, never on what
//! others look at, and nothing is looked at that is known.

use qwenkit_models::{Grid, PatchPlan, Pixels, VisionFfn, VisionNorm, VisionPlan};

use super::*;
use crate::vision::VisualKind;

const IMAGE: TokenId = TokenId(30);
const VIDEO: TokenId = TokenId(31);

/// A tower that makes one vector of one patch of one value.
fn vision() -> VisionInfo {
    let plan = VisionPlan {
        architecture: "mock",
        patch: PatchPlan { side: 1, frames: 1, channels: 1, merge: 1, bias: false },
        width: 4,
        heads: 1,
        layers: 1,
        ffn: VisionFfn::Gated { width: 1 },
        norm: VisionNorm::Layer,
        norm_eps: 0.0,
        theta: 2.0,
        table_side: None,
        windows: None,
        deepstack: Vec::new(),
        films_by_step: false,
        positions_per_second: Some(2.0),
        out_width: WIDTH,
    };
    VisionInfo { plan, image_token: IMAGE, video_token: VIDEO }
}

fn bench(pages: usize, slots: Option<usize>) -> Bench {
    let slots = slots.map(|slots| vec![Vec::new(); slots + CHECKPOINTS]);
    Bench::with_mock(pages, slots, Some(vision()))
}

/// An image of one colour.
fn image(colour: u32, rows: usize, cols: usize) -> Visual {
    let grid = Grid { steps: 1, rows, cols };
    Visual::image(Pixels { values: vec![colour as f32; rows * cols], grid })
}

/// Text of `before` tokens, an image, text of `after` tokens.
fn seeing(before: usize, visual: Visual, after: usize) -> Request {
    let (mut ids, mut visuals) = (text(1, before), Vec::new());
    ids.push(IMAGE);
    ids.extend(text(2, after));
    visuals.push(visual);
    let (ids, placed) = vision().expand(&ids, visuals).unwrap();
    Request { visuals: placed, stop_tokens: Vec::new(), ..request(&ids, 6) }
}

/// Text without placeholders.
fn text(seed: u32, len: usize) -> Vec<TokenId> {
    tokens(seed, len).into_iter().map(|id| TokenId(id.0 % 30)).collect()
}

/// Its answer where nobody else is served.
fn alone(request: Request) -> Vec<TokenId> {
    let mut bench = bench(16, None);
    let id = bench.submit(request).unwrap();
    bench.run();
    let (ids, finish) = bench.answer(id);
    assert_eq!((ids.len(), finish), (6, Some(Finish::Length)));
    ids
}

#[test]
fn an_image_changes_the_answer_and_so_does_its_shape() {
    let plain = alone(seeing(5, image(1, 2, 3), 4));
    assert_eq!(alone(seeing(5, image(1, 2, 3), 4)), plain);
    assert_ne!(alone(seeing(5, image(2, 2, 3), 4)), plain, "another colour");
    assert_ne!(alone(seeing(5, image(1, 3, 2), 4)), plain, "another shape");
}

#[test]
fn prompts_that_differ_in_an_image_share_what_is_before_it_only() {
    let requests =
        || [(1, 10, 9), (2, 10, 9), (1, 9, 10), (1, 10, 9)].map(|(colour, r, c)| seeing(70, image(colour, r, c), 80));
    let expected = requests().map(alone);
    for slots in [None, Some(2)] {
        // One after the other, then all at once.
        let mut bench = bench(64, slots);
        let one_by_one = requests().map(|request| {
            let id = bench.submit(request).unwrap();
            bench.run();
            id
        });
        let together = requests().map(|request| bench.submit(request).unwrap());
        bench.run();
        for (ids, what) in [(one_by_one, "one by one"), (together, "together")] {
            for (id, expected) in ids.into_iter().zip(&expected) {
                assert_eq!(&bench.answer(id).0, expected, "{what}, with {slots:?} slots");
            }
        }
        if slots.is_none() {
            // 70 tokens of text, then the image: the second and the third share one page and the six tokens behind it.
            let cached = one_by_one.map(|id| bench.cached(id));
            assert_eq!(cached[..3], [0, 70, 70], "of {slots:?} slots");
            assert_eq!(cached[3], 70 + 90 + 79, "the same image again");
            assert_eq!(bench.scheduler.runner.looks.len(), 3, "three images");
            assert!(bench.scheduler.runner.looks.values().all(|looks| *looks == 3), "each looked at once");
        }
    }
}

#[test]
fn any_cut_gives_the_same_answer() {
    let expected = alone(seeing(7, image(3, 11, 11), 9));
    for others in 1..5 {
        let mut bench = bench(40, None);
        // Long prompts beside it, so that it gets the rows that are left.
        for i in 0..others {
            bench.submit(request(&text(20 + i, 300 + 17 * i as usize), 30)).unwrap();
        }
        let id = bench.submit(seeing(7, image(3, 11, 11), 9)).unwrap();
        bench.run();
        assert_eq!(bench.answer(id).0, expected, "{others} others");
    }
}

#[test]
fn others_go_on_while_an_image_is_looked_at() {
    let mut bench = bench(16, None);
    let writer = bench.submit(Request { stop_tokens: Vec::new(), ..request(&text(1, 5), 50) }).unwrap();
    bench.step();
    bench.submit(seeing(0, image(1, 2, 2), 0)).unwrap();
    let before = bench.answer(writer).0.len();
    bench.step();
    bench.step();
    assert_eq!(bench.answer(writer).0.len(), before + 2, "two looks, two tokens");
    bench.run();
}

#[test]
fn an_image_survives_giving_way() {
    let expected = alone(seeing(3, image(4, 8, 8), 20));
    let mut bench = bench(5, None);
    let low = Request { priority: Priority::Low, max_tokens: 40, ..seeing(3, image(4, 8, 8), 20) };
    let low = bench.submit(low).unwrap();
    for _ in 0..6 {
        bench.step();
    }
    let high = Request { priority: Priority::High, stop_tokens: Vec::new(), ..request(&text(9, 200), 60) };
    bench.submit(high).unwrap();
    bench.run();
    assert_eq!(bench.answer(low).0[..6], expected);
    assert!(bench.scheduler.gauges().read().preempted > 0, "it gave way");
}

#[test]
fn an_image_that_cannot_be_looked_at_ends_its_request_alone_and_says_why() {
    let expected = alone(seeing(5, image(1, 2, 3), 4));
    let mut bench = bench(16, None);
    let unseeable = bench.submit(seeing(70, image(UNSEEABLE as u32, 2, 3), 4)).unwrap();
    let other = bench.submit(seeing(5, image(1, 2, 3), 4)).unwrap();
    bench.run();
    assert_eq!(bench.answer(other).0, expected);
    let events = bench.events[unseeable].lock().unwrap();
    let told = matches!(events.last(), Some(Event::GivenUp(reason)) if reason.contains("could not be looked at"));
    assert!(
        told && !events.iter().any(|event| matches!(event, Event::Token { .. } | Event::Finished(_))),
        "{events:?}"
    );
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |request: Request| bench(4, None).submit(request).map(|_| ()).unwrap_err().to_string();
    let good = || seeing(2, image(1, 2, 2), 2);
    let moved = |by: isize| {
        let mut request = good();
        request.visuals[0].start = request.visuals[0].start.wrapping_add_signed(by);
        request
    };
    for request in [moved(1), moved(-1), moved(100), moved(-3)] {
        assert!(refused(request).contains("placeholder tokens of images, expected 4"));
    }
    let twice = Request { visuals: [good().visuals, good().visuals].concat(), ..good() };
    assert!(refused(twice).contains("placeholder"));
    let empty = Visual::image(Pixels { values: vec![1.0; 3], grid: Grid { steps: 1, rows: 2, cols: 2 } });
    let short = Request { visuals: vec![crate::vision::Placed { visual: empty, start: 2 }], ..good() };
    assert!(refused(short).contains("3 values for a grid of (1, 2, 2) patches, expected 4"));
    let mut blind = Bench::new(4);
    assert!(blind.submit(good()).map(|_| ()).unwrap_err().to_string().contains("read text only"));
}

#[test]
fn placeholders_become_as_many_as_their_visuals_need() {
    let vision = vision();
    let film = |steps| {
        let grid = Grid { steps, rows: 1, cols: 1 };
        Visual::new(Pixels { values: vec![5.0; steps], grid }, VisualKind::Film { seconds_per_step: 0.5 })
    };
    let ids = [1, 31, 30, 2, 30].map(TokenId);
    let visuals = || vec![image(1, 1, 2), film(3), image(2, 2, 2)];
    let (expanded, placed) = vision.expand(&ids, visuals()).unwrap();
    assert_eq!(expanded, [1, 31, 31, 31, 30, 30, 2, 30, 30, 30, 30].map(TokenId));
    let starts: Vec<usize> = placed.iter().map(|p| p.start).collect();
    assert_eq!(starts, [1, 4, 7]);
    let again = vision.place(&expanded, visuals()).unwrap();
    assert_eq!(again.iter().map(|p| p.start).collect::<Vec<_>>(), starts);
    assert!(vision.expand(&ids[..4], visuals()).is_err(), "an image too many");
    assert!(vision.expand(&ids, vec![image(1, 1, 1), film(1)]).is_err(), "an image too few");
    assert!(vision.place(&expanded[..10], visuals()).is_err(), "a vector without a place");
    let swapped = vec![image(2, 2, 2), film(3), image(1, 1, 2)];
    let message = vision.place(&expanded, swapped).unwrap_err().to_string();
    let told = "9 placeholder tokens of images, expected 9 in runs of 4, 3, 2, found runs of 3, 2, 4\nhint: ";
    assert!(message.contains(told), "{message}");
    assert!(vision.place(&[expanded.clone(), vec![IMAGE]].concat(), visuals()).is_err(), "a place without a vector");
}
