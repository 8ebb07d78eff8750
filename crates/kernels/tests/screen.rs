//! Output heads in two parts: their products have the bits of ordinary ones, and the largest results are found without
//! computing all.

use half::f16;
use qwenkit_kernels::{BackProduct, Best, Compute, HeadLoss, Isa, Join, MatmulScratch, Product, Weight};
use qwenkit_tensor::DType;

/// A small deterministic generator (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// Blocks of Q8_0 from `f(row, unit)`: a scale and 32 quants.
fn stored(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> (f32, [i8; 32])) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (row, unit) in (0..rows).flat_map(|row| (0..cols / 32).map(move |unit| (row, unit))) {
        let (scale, quants) = f(row, unit);
        bytes.extend(f16::from_f32(scale).to_le_bytes());
        bytes.extend(quants.map(|q| q as u8));
    }
    bytes
}

fn random_bytes(rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    stored(rows, cols, |_, _| (random.value() * 0.01, std::array::from_fn(|_| random.next() as i8)))
}

/// The same matrix as an ordinary weight and in two parts.
fn both(compute: &Compute, rows: usize, cols: usize, bytes: &[u8]) -> (Weight, Weight) {
    let whole = Weight::from_bytes(compute.pool(), DType::Q8_0, rows, cols, bytes).unwrap();
    (whole, Weight::head_from_bytes(compute.pool(), DType::Q8_0, rows, cols, bytes).unwrap())
}

fn product(compute: &Compute, weight: &Weight, x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / weight.cols() * weight.rows()];
    compute.matmul(&mut MatmulScratch::default(), x, &mut [Product { weight, out: &mut out }]);
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_head_in_two_parts_has_the_bits_of_an_ordinary_weight() {
    let mut random = Random(1);
    for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
        let compute = Compute::new(threads, isa);
        for (tokens, rows, cols) in [(1, 1, 32), (2, 17, 64), (3, 31, 96), (5, 48, 288), (8, 150, 32), (29, 70, 160)] {
            let bytes = random_bytes(rows, cols, &mut random);
            let (whole, head) = both(&compute, rows, cols, &bytes);
            let what = format!("{isa}, {threads} threads, ({tokens}, {rows}, {cols})");
            let x = random.values(tokens * cols);
            assert_eq!(bits(&product(&compute, &whole, &x)), bits(&product(&compute, &head, &x)), "{what}");
            let (mut a, mut b) = (vec![0.0; cols], vec![0.0; cols]);
            for row in 0..rows {
                whole.row(row, &mut a);
                head.row(row, &mut b);
                assert_eq!(bits(&a), bits(&b), "{what}: row {row}");
            }
            let backward = |weight: &Weight| {
                let (dy, mut dx) = (Random(2).values(tokens * rows), vec![0.0; tokens * cols]);
                compute.matmul_backward(&[BackProduct { weight, dy: &dy }], Join::OVER, &mut dx);
                bits(&dx)
            };
            assert_eq!(backward(&whole), backward(&head), "{what}: backward");
            let loss = |head: &Weight| {
                let targets: Vec<u32> = (0..tokens).map(|t| (t * 7 % rows) as u32).collect();
                let (mut losses, mut dx) = (vec![0.0; tokens], vec![0.0; tokens * cols]);
                let loss = HeadLoss { head, targets: &targets, scale: 0.5 };
                compute.head_loss(&mut MatmulScratch::default(), &loss, &x, &mut losses, Some(&mut dx));
                (bits(&losses), bits(&dx))
            };
            assert_eq!(loss(&whole), loss(&head), "{what}: loss");
        }
    }
}

/// Asks for the best of `x` in every way, and holds what comes against all results. Returns the bytes that were read.
fn check(compute: &Compute, head: &Weight, x: &[f32], wanted: &[Best<'_>], what: &str) -> usize {
    let full = product(compute, head, x);
    let mut found = vec![f32::NAN; full.len()];
    let read = compute.best(&mut MatmulScratch::default(), x, head, wanted, &mut found);
    for ((t, best), (full, found)) in
        wanted.iter().enumerate().zip(full.chunks_exact(head.rows()).zip(found.chunks_exact(head.rows())))
    {
        let mut measures: Vec<f32> = (0..best.among.min(head.rows()))
            .filter(|row| !best.lowered.contains(&(*row as u32)))
            .map(|row| full[row])
            .collect();
        measures.sort_by(|a, b| b.total_cmp(a));
        let bar = measures.get(best.count - 1).copied().unwrap_or(f32::NEG_INFINITY);
        for (row, (full, found)) in full.iter().zip(found).enumerate() {
            let is_wanted = row < best.among && (*full >= bar || full.is_nan());
            let is_there = found.to_bits() == full.to_bits();
            let fits = is_there || !is_wanted && *found == f32::NEG_INFINITY;
            assert!(fits, "{what}, row {t}, {best:?}: {row} is {found} for {full}, bar {bar}");
        }
    }
    let one = Compute::new(1, compute.isa());
    let mut alone = vec![f32::NAN; found.len()];
    let read_alone = one.best(&mut MatmulScratch::default(), x, head, wanted, &mut alone);
    assert_eq!((read, bits(&found)), (read_alone, bits(&alone)), "{what}: one thread");
    read
}

#[test]
fn the_largest_results_are_exact_and_others_are_left_out() {
    let mut random = Random(3);
    let (rows, cols) = (2_005, 96);
    let bytes = random_bytes(rows, cols, &mut random);
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        let (_, head) = both(&compute, rows, cols, &bytes);
        for tokens in 1..=5 {
            let x = random.values(tokens * cols);
            let lowered: Vec<u32> = (0..300).map(|_| (random.next() % 2_100) as u32).collect();
            for (count, among) in [(1, rows), (1, 1), (2, 1_990), (20, 1_000), (64, rows), (3_000, rows), (1, 0)] {
                let plain = vec![Best { count, among, lowered: &[] }; tokens];
                check(&compute, &head, &x, &plain, &format!("{isa}, {tokens} rows"));
                // Each row has its own wishes.
                let mixed: Vec<_> = (0..tokens)
                    .map(|t| Best { count: count + t, among: among.saturating_sub(t), lowered: &lowered[t * 40..] })
                    .collect();
                check(&compute, &head, &x, &mixed, &format!("{isa}, {tokens} rows, mixed"));
            }
        }
        // All that is largest is lowered.
        let x = random.values(cols);
        let full = product(&compute, &head, &x);
        let mut order: Vec<u32> = (0..rows as u32).collect();
        order.sort_by(|a, b| full[*b as usize].total_cmp(&full[*a as usize]));
        for lowered in [&order[..1], &order[..50], &order[..1_999], &order[..]] {
            check(&compute, &head, &x, &[Best { count: 3, among: rows, lowered }], &format!("{isa}, lowered"));
        }
    }
}

/// An x that stands out along one row of the head, as a model's does.
#[test]
fn less_is_read_where_few_are_in_question() {
    let mut random = Random(4);
    let (rows, cols) = (3_200, 256);
    let bytes = stored(rows, cols, |_, _| (0.01, std::array::from_fn(|_| random.next() as i8)));
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        let (whole, head) = both(&compute, rows, cols, &bytes);
        let mut x = vec![0.0; cols];
        whole.row(1_234, &mut x);
        let read = check(&compute, &head, &x, &[Best { count: 1, among: rows, lowered: &[] }], isa.name());
        let share = read as f64 / head.size_bytes() as f64;
        assert!((0.6..0.7).contains(&share), "{isa}: {share}");
        let read = check(&compute, &head, &vec![0.0; cols], &[Best { count: 1, among: rows, lowered: &[] }], "zeros");
        assert_eq!(read, head.size_bytes(), "{isa}: nothing is known of zeros");
    }
}

/// The bound is what the lower bits can do: here they do it, to rows whose upper bits say the opposite.
#[test]
fn lower_bits_that_all_point_one_way_are_not_underrated() {
    let mut random = Random(5);
    let (rows, cols) = (512, 128);
    let signs: Vec<bool> = (0..cols).map(|_| random.next() & 1 == 1).collect();
    let x: Vec<f32> = signs.iter().map(|up| if *up { 1.0 } else { -1.0 }).collect();
    // Lower bits 0 or 7; upper bits alike in all rows but for one step up or down of one quant.
    let upper: Vec<i32> = (0..cols).map(|_| (random.next() % 30) as i32 - 15).collect();
    let bytes = stored(rows, cols, |row, unit| {
        let quants = std::array::from_fn(|i| {
            let k = 32 * unit + i;
            let with = if row % 7 == 3 { signs[k] } else { row * 31 % 50 < k % 50 };
            let step = i32::from(k == row % cols) * if row % 7 == 3 && signs[k] { -1 } else { 1 };
            (8 * (upper[k] + step) + if with { 7 } else { 0 }) as i8
        });
        (0.02, quants)
    });
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        let (_, head) = both(&compute, rows, cols, &bytes);
        for count in [1, 5, 70, 74] {
            check(&compute, &head, &x, &[Best { count, among: rows, lowered: &[] }], &format!("{isa}, aligned"));
        }
    }
}

#[test]
fn equal_rows_are_all_there() {
    let (rows, cols) = (400, 64);
    let mut random = Random(6);
    let quants: Vec<[i8; 32]> = (0..2).map(|_| std::array::from_fn(|_| random.next() as i8)).collect();
    let all = stored(rows, cols, |_, unit| (0.01, quants[unit]));
    let some = stored(rows, cols, |row, unit| (if row % 150 == 7 { 0.01 } else { 0.001 }, quants[unit]));
    let nothing = stored(rows, cols, |_, _| (0.0, [5; 32]));
    for isa in Isa::available() {
        let compute = Compute::new(3, isa);
        for bytes in [&all, &some, &nothing] {
            let (whole, head) = both(&compute, rows, cols, bytes);
            let mut x = vec![0.0; cols];
            whole.row(7, &mut x);
            x[0] += 1.0;
            for count in [1, 2, 3, 4] {
                check(&compute, &head, &x, &[Best { count, among: rows, lowered: &[7, 9] }], &format!("{isa}, equals"));
            }
        }
    }
}

#[test]
fn what_bounds_do_not_hold_for_goes_the_ordinary_way() {
    let (rows, cols) = (100, 64);
    let mut random = Random(7);
    let bytes = random_bytes(rows, cols, &mut random);
    let infinite = stored(rows, cols, |row, _| (if row == 50 { f32::INFINITY } else { 0.01 }, [3; 32]));
    let huge = stored(rows, cols, |row, _| (60_000.0 - row as f32, [-128; 32]));
    let tiny = stored(rows, cols, |row, _| (1e-7 * (row % 3) as f32, std::array::from_fn(|i| (row + i) as i8)));
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        let wanted = [Best { count: 2, among: rows, lowered: &[] }];
        for special in [f32::NAN, f32::INFINITY, 1e30, 1e-30, 1e15, 1e-15] {
            for bytes in [&bytes, &infinite, &huge, &tiny] {
                let (_, head) = both(&compute, rows, cols, bytes);
                for place in [0, 40] {
                    let mut x = random.values(cols);
                    x[place] = special;
                    let full = product(&compute, &head, &x);
                    if full.iter().any(|x| x.is_nan()) {
                        let mut found = vec![0.0; rows];
                        let read = compute.best(&mut MatmulScratch::default(), &x, &head, &wanted, &mut found);
                        assert_eq!((bits(&found), read), (bits(&full), head.size_bytes()), "{isa}, {special}");
                    } else {
                        check(&compute, &head, &x, &wanted, &format!("{isa}, {special}"));
                    }
                }
                let x: Vec<f32> = random.values(cols).iter().map(|x| x * special.min(1e30)).collect();
                if product(&compute, &head, &x).iter().all(|x| !x.is_nan()) {
                    check(&compute, &head, &x, &wanted, &format!("{isa}, all {special}"));
                }
            }
        }
    }
}

/// A type that has no form in two parts.
#[test]
fn other_types_are_computed_in_full() {
    let compute = Compute::new(2, Isa::Portable);
    let values = Random(8).values(40 * 32);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let head = Weight::head_from_bytes(compute.pool(), DType::F32, 40, 32, &bytes).unwrap();
    let x = Random(9).values(32);
    let read = check(&compute, &head, &x, &[Best { count: 1, among: 40, lowered: &[] }], "F32");
    assert_eq!(read, head.size_bytes());
}
