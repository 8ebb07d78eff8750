//! Curves as SVG.

use std::fmt::Write;

/// Width and height of a chart.
const SIZE: (f64, f64) = (760.0, 240.0);
/// Room around the curves: left for figures, below for steps.
const ROOM: (f64, f64, f64, f64) = (56.0, 12.0, 12.0, 24.0);
/// Points of a curve; more than there are pixels show nothing more.
const POINTS_MAX: usize = 700;

/// A chart of curves over steps.
pub(super) struct Chart {
    pub(super) title: &'static str,
    pub(super) series: Vec<Series>,
    /// Whether the axis begins at nought, rather than a little below the least value.
    pub(super) from_zero: bool,
}

/// One curve.
pub(super) struct Series {
    name: &'static str,
    class: &'static str,
    points: Vec<(f64, f64)>,
}

impl Series {
    /// A plain line.
    pub(super) fn line(name: &'static str, points: Vec<(f64, f64)>) -> Series {
        Series { name, class: "line", points }
    }

    /// A line in the background.
    pub(super) fn faint(name: &'static str, points: Vec<(f64, f64)>) -> Series {
        Series { name, class: "faint", points }
    }

    /// A line with a dot at each point.
    pub(super) fn dots(name: &'static str, points: Vec<(f64, f64)>) -> Series {
        Series { name, class: "dots", points }
    }
}

impl Chart {
    /// Whether there is nothing to show.
    pub(super) fn is_empty(&self) -> bool {
        self.series.iter().all(|series| series.points.is_empty())
    }

    /// The chart with its title and the names of its curves.
    pub(super) fn to_svg(&self) -> String {
        let all = || self.series.iter().flat_map(|series| series.points.iter().copied());
        let (x_min, x_max) = range(all().map(|(x, _)| x));
        let (mut y_min, mut y_max) = range(all().map(|(_, y)| y));
        if self.from_zero {
            y_min = y_min.min(0.0);
        }
        // A flat curve stands in the middle.
        let air = if y_max > y_min { (y_max - y_min) * 0.05 } else { y_max.abs().max(1.0) * 0.1 };
        y_max += air;
        if !self.from_zero || y_min < 0.0 {
            y_min -= air;
        }
        let (width, height) = (SIZE.0 - ROOM.0 - ROOM.2, SIZE.1 - ROOM.1 - ROOM.3);
        let x_at = |x: f64| ROOM.0 + width * if x_max > x_min { (x - x_min) / (x_max - x_min) } else { 0.5 };
        let y_at = |y: f64| ROOM.1 + height * (1.0 - (y - y_min) / (y_max - y_min));
        let mut svg = format!(
            "<figure><figcaption>{}</figcaption>\n<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">\n",
            self.title, SIZE.0, SIZE.1, self.title
        );
        // Writing to a string cannot fail.
        for tick in ticks(y_min, y_max, 5) {
            let y = y_at(tick);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                ROOM.0,
                SIZE.0 - ROOM.2
            );
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                ROOM.0 - 6.0,
                y + 4.0,
                shown(tick)
            );
        }
        for tick in ticks(x_min, x_max, 8).into_iter().filter(|tick| tick.fract() == 0.0) {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
                x_at(tick),
                SIZE.1 - 6.0
            );
        }
        for series in &self.series {
            let points: Vec<(f64, f64)> = thinned(&series.points).iter().map(|&(x, y)| (x_at(x), y_at(y))).collect();
            let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            if !path.is_empty() {
                let _ = writeln!(svg, "<polyline class=\"{}\" points=\"{}\"/>", series.class, path.join(" "));
            }
            if series.class == "dots" {
                for (&(x, y), &(step, value)) in points.iter().zip(&thinned(&series.points)) {
                    let title = format!("step {step}: {}", shown(value));
                    let _ = writeln!(
                        svg,
                        "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"><title>{title}</title></circle>"
                    );
                }
            }
        }
        svg.push_str(&self.names());
        svg.push_str("</svg></figure>\n");
        svg
    }

    /// The names of the curves, where there are several.
    fn names(&self) -> String {
        let named: Vec<&Series> = self.series.iter().filter(|series| !series.points.is_empty()).collect();
        if named.len() < 2 {
            return String::new();
        }
        let mut x = SIZE.0 - ROOM.2;
        let mut names = String::new();
        for series in named.iter().rev() {
            let _ = writeln!(
                names,
                "<text x=\"{x:.0}\" y=\"{}\" text-anchor=\"end\">{}</text>",
                ROOM.1 + 10.0,
                series.name
            );
            // Letters are some six units wide.
            x -= series.name.len() as f64 * 6.0 + 8.0;
            let _ = writeln!(
                names,
                "<line class=\"{}\" x1=\"{:.0}\" x2=\"{x:.0}\" y1=\"{y}\" y2=\"{y}\"/>",
                series.class,
                x - 18.0,
                y = ROOM.1 + 6.0
            );
            x -= 30.0;
        }
        names
    }
}

/// The least and the greatest value; nought where there is none.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let range =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| (least.min(value), most.max(value)));
    if range.0 <= range.1 { range } else { (0.0, 0.0) }
}

/// Round numbers between two bounds, about so many: steps of 1, 2 or 5 times a power of ten.
fn ticks(least: f64, most: f64, about: usize) -> Vec<f64> {
    let span = most - least;
    if !span.is_finite() || span <= 0.0 {
        return vec![least];
    }
    let rough = span / about as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power).find(|&step| step >= rough).unwrap_or(rough);
    let first = (least / step).ceil() as i64;
    let last = (most / step).floor() as i64;
    (first..=last).map(|times| times as f64 * step).collect()
}

/// A number with as many digits as tell it from its neighbours.
fn shown(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 0.01 => {
            let text = format!("{value:.3}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{value:.1e}"),
    }
}

/// Points for the pixels that there are: of each stretch the least and the greatest, so that no peak is lost.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= POINTS_MAX {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(POINTS_MAX / 2);
    let mut kept = Vec::with_capacity(POINTS_MAX);
    for stretch in points.chunks(stretch) {
        let by_value = |one: &&(f64, f64), other: &&(f64, f64)| one.1.total_cmp(&other.1);
        let (Some(&least), Some(&most)) = (stretch.iter().min_by(by_value), stretch.iter().max_by(by_value)) else {
            continue;
        };
        let (first, second) = if least.0 <= most.0 { (least, most) } else { (most, least) };
        kept.push(first);
        if first != second {
            kept.push(second);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(1.0, 1.0, 5), [1.0]);
        assert_eq!(ticks(0.13, 0.29, 4).len(), 3);
        assert_eq!(
            [shown(0.0), shown(1234.4), shown(0.25), shown(2e-4), shown(3.0)],
            ["0", "1234", "0.25", "2.0e-4", "3"]
        );
    }

    #[test]
    fn long_curves_keep_their_peaks() {
        let points: Vec<(f64, f64)> =
            (0..100_000).map(|x| (f64::from(x), if x == 77_777 { 9.0 } else { 1.0 })).collect();
        let kept = thinned(&points);
        assert!(kept.len() <= POINTS_MAX);
        assert!(kept.contains(&(77_777.0, 9.0)));
        assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn one_point_and_flat_curves_are_drawn_inside() {
        let svg = Chart { title: "t", series: vec![Series::dots("a", vec![(3.0, 2.0)])], from_zero: false }.to_svg();
        assert!(svg.contains("cx=\"402.0\"") && !svg.contains("NaN"), "{svg}");
    }
}
