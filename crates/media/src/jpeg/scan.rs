//! Scans: entropy-coded data -> coefficients, baseline and progressive (ITU T.81, F.2 and G.2).

use super::Tables;
use super::bits::{Bits, Huffman};
use super::frame::Frame;
use crate::error::Error;

/// Where the coefficients of a file's order stand in a block. Positions beyond 63, of hostile runs, are checked before.
pub(super) const NATURAL: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
];

/// What a scan's header says of its coefficients.
#[derive(Clone, Copy)]
struct Band {
    /// The first and the last coefficient, in the order of the file.
    first: usize,
    last: usize,
    /// Whether bits are added to coefficients that came before.
    is_refinement: bool,
    /// The bit position that this scan brings.
    low: u32,
}

/// One component of a scan.
struct Part<'a> {
    component: usize,
    dc: Option<&'a Huffman>,
    ac: Option<&'a Huffman>,
    /// The last DC coefficient.
    predicted: i32,
}

/// Decodes a scan with this header, whose data begin `data`; says how many bytes they have.
pub(super) fn decode(frame: &mut Frame, tables: &Tables, header: &[u8], data: &[u8]) -> Result<usize, Error> {
    let (mut parts, band) = read_header(frame, tables, header)?;
    for part in &parts {
        let component = &mut frame.components[part.component];
        if component.table.is_none() {
            component.table = tables.quantisation[component.quantisation];
        }
        if component.table.is_none() {
            return Err(Error::damaged("a component's quantisation table is missing"));
        }
    }
    let mut bits = Bits::new(data);
    // A component alone comes block by block, and only blocks that hold pixels; several come in units.
    let alone = parts.len() == 1;
    let (wide, high) = match &parts[..] {
        [only] => (frame.components[only.component].blocks_wide, frame.components[only.component].blocks_high),
        _ => (frame.width.div_ceil(8 * frame.h_max), frame.height.div_ceil(8 * frame.v_max)),
    };
    let mut skipped_blocks = 0_u32;
    let (mut left, mut restarts) = (tables.restart_interval, 0);
    for unit in 0..wide * high {
        if tables.restart_interval > 0 && left == 0 {
            bits.restart(restarts % 8)?;
            restarts += 1;
            left = tables.restart_interval;
            skipped_blocks = 0;
            parts.iter_mut().for_each(|part| part.predicted = 0);
        }
        left = left.wrapping_sub(1);
        let (x, y) = (unit % wide, unit / wide);
        for part in &mut parts {
            let component = &mut frame.components[part.component];
            let (h, v) = if alone { (1, 1) } else { (component.h, component.v) };
            for (row, col) in (0..v).flat_map(|row| (0..h).map(move |col| (row, col))) {
                let at = (y * v + row) * component.stride + x * h + col;
                let block = &mut component.coefficients[at];
                match frame.is_progressive {
                    false => baseline(&mut bits, part, block)?,
                    true => progressive(&mut bits, part, block, band, &mut skipped_blocks)?,
                }
            }
        }
        if bits.is_overdrawn() {
            let found = format!("data of {unit} of {} units", wide * high);
            return Err(Error::cut_short(found, "all of them"));
        }
    }
    Ok(bits.end())
}

fn read_header<'a>(frame: &Frame, tables: &'a Tables, header: &[u8]) -> Result<(Vec<Part<'a>>, Band), Error> {
    let wrong = || Error::damaged("the header of a scan is wrong");
    let (&count, rest) = header.split_first().ok_or_else(wrong)?;
    let (chosen, rest) = rest.split_at_checked(2 * usize::from(count)).ok_or_else(wrong)?;
    let mut parts: Vec<Part> = Vec::with_capacity(count.into());
    for &[id, choice] in chosen.as_chunks().0 {
        let component = frame.components.iter().position(|component| component.id == id).ok_or_else(wrong)?;
        if parts.iter().any(|part| part.component == component) {
            return Err(wrong());
        }
        let (dc, ac) = (usize::from(choice >> 4), usize::from(choice & 15));
        let table = |tables: &'a [Option<Huffman>; 4], i: usize| tables.get(i).and_then(Option::as_ref);
        parts.push(Part { component, dc: table(&tables.dc, dc), ac: table(&tables.ac, ac), predicted: 0 });
    }
    let &[first, last, approximation, ..] = rest else { return Err(wrong()) };
    let (high, low) = (approximation >> 4, approximation & 15);
    let band = match frame.is_progressive {
        false => Band { first: 0, last: 63, is_refinement: false, low: 0 },
        true => Band { first: first.into(), last: last.into(), is_refinement: high > 0, low: low.into() },
    };
    let dc_alone = band.first > 0 || band.last == 0 || !frame.is_progressive;
    let units: usize = parts.iter().map(|part| &frame.components[part.component]).map(|c| c.h * c.v).sum();
    let fits = !parts.is_empty()
        && dc_alone
        && band.first <= band.last
        && band.last < 64
        && low < 14
        && (high == 0 || high == low + 1 || !frame.is_progressive)
        && (band.first == 0 || parts.len() == 1)
        // The standard's bound for interleaved units.
        && (parts.len() == 1 || units <= 10);
    if fits { Ok((parts, band)) } else { Err(wrong()) }
}

fn table(table: Option<&Huffman>) -> Result<&Huffman, Error> {
    table.ok_or_else(|| Error::damaged("a scan's Huffman table is missing"))
}

/// The next DC coefficient, before its bit position.
fn dc(bits: &mut Bits, part: &mut Part) -> Result<i32, Error> {
    let size = bits.code(table(part.dc)?)?;
    if size > 15 {
        return Err(Error::damaged("a coefficient is out of range"));
    }
    part.predicted = part.predicted.wrapping_add(bits.signed(size.into()));
    Ok(part.predicted)
}

fn baseline(bits: &mut Bits, part: &mut Part, block: &mut [i16; 64]) -> Result<(), Error> {
    block[0] = dc(bits, part)? as i16;
    // Whatever run its end code has, a block of this kind ends alone.
    coefficients(bits, table(part.ac)?, block, (1, 63), 0)?;
    Ok(())
}

/// Coefficients from `first` to `last`, times 2 to the power of `low`; the run of the code that ends them before, if one does.
fn coefficients(
    bits: &mut Bits,
    ac: &Huffman,
    block: &mut [i16; 64],
    (first, last): (usize, usize),
    low: u32,
) -> Result<Option<usize>, Error> {
    let mut k = first;
    while k <= last {
        let code = bits.code(ac)?;
        let (run, size) = (usize::from(code >> 4), u32::from(code & 15));
        if size == 0 {
            if run < 15 {
                return Ok(Some(run));
            }
            k += 16;
            continue;
        }
        k += run;
        if k > 63 {
            return Err(Error::damaged("a block has more coefficients than 64"));
        }
        block[NATURAL[k]] = (bits.signed(size) << low) as i16;
        k += 1;
    }
    Ok(None)
}

fn progressive(
    bits: &mut Bits,
    part: &mut Part,
    block: &mut [i16; 64],
    band: Band,
    skipped: &mut u32,
) -> Result<(), Error> {
    match (band.first, band.is_refinement) {
        (0, false) => block[0] = (dc(bits, part)? << band.low) as i16,
        (0, true) => block[0] |= (bits.take(1) << band.low) as i16,
        (_, false) => ac_first(bits, table(part.ac)?, block, band, skipped)?,
        (_, true) => ac_refinement(bits, table(part.ac)?, block, band, skipped)?,
    }
    Ok(())
}

/// Blocks without further coefficients that a code of this run stands for, this one included.
fn run_of_blocks(bits: &mut Bits, run: usize) -> u32 {
    (1 << run) + bits.take(run as u32)
}

fn ac_first(bits: &mut Bits, ac: &Huffman, block: &mut [i16; 64], band: Band, skipped: &mut u32) -> Result<(), Error> {
    if *skipped > 0 {
        *skipped -= 1;
        return Ok(());
    }
    if let Some(run) = coefficients(bits, ac, block, (band.first, band.last), band.low)? {
        *skipped = run_of_blocks(bits, run) - 1;
    }
    Ok(())
}

fn ac_refinement(
    bits: &mut Bits,
    ac: &Huffman,
    block: &mut [i16; 64],
    band: Band,
    skipped: &mut u32,
) -> Result<(), Error> {
    let bit = 1_i16 << band.low;
    // A coefficient that is there already takes a bit, which moves it away from zero.
    let refine = |bits: &mut Bits, value: &mut i16| {
        if bits.take(1) == 1 && *value & bit == 0 {
            *value = value.wrapping_add(if *value >= 0 { bit } else { -bit });
        }
    };
    let mut k = band.first;
    if *skipped == 0 {
        while k <= band.last {
            let code = bits.code(ac)?;
            let (mut run, size) = (usize::from(code >> 4), code & 15);
            let new = match size {
                0 if run < 15 => {
                    *skipped = run_of_blocks(bits, run);
                    break;
                }
                0 => 0,
                1 if bits.take(1) == 1 => bit,
                1 => -bit,
                _ => return Err(Error::damaged("a refined coefficient has more than one bit")),
            };
            // Over `run` coefficients that are still zero, refining the others on the way.
            while k <= band.last {
                let value = &mut block[NATURAL[k]];
                if *value != 0 {
                    refine(bits, value);
                } else if run == 0 {
                    if new != 0 {
                        *value = new;
                    }
                    break;
                } else {
                    run -= 1;
                }
                k += 1;
            }
            k += 1;
        }
    }
    if *skipped > 0 {
        for k in k..=band.last {
            let value = &mut block[NATURAL[k]];
            if *value != 0 {
                refine(bits, value);
            }
        }
        *skipped -= 1;
    }
    Ok(())
}
