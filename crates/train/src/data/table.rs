//! Tables in CSV: RFC 4180, read strictly, each row as an object of its header's names.
//!
//! Contract: a quote that is never closed, text behind a closing quote and a row with more or fewer cells than the header
//! are faults of the line where the row begins. A cell in quotes may hold line breaks. A quote inside of a cell that does not
//! begin with one is an ordinary character, as in spreadsheets' output.

use std::io::BufRead;

use serde_json::{Map, Value};

use super::Problem;
use super::lines::Lines;

/// The longest row; a quote that is never closed ends here at the latest.
const ROW_BYTES_MAX: usize = 64 << 20;

/// A reader of rows.
pub(crate) struct Table<R> {
    lines: Lines<R>,
    separator: char,
    header: Vec<String>,
}

/// A row: the line where it begins, and its cells or what is wrong with it.
pub(crate) struct Row {
    pub(crate) line: usize,
    pub(crate) object: Result<Map<String, Value>, Problem>,
}

/// Cells of a row, as far as they are read.
#[derive(Default)]
struct Cells {
    done: Vec<String>,
    cell: String,
    place: Place,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Start,
    Plain,
    Quoted,
    /// Behind a quote in a quoted cell: its end, or the first of two.
    Quote,
}

impl<R: BufRead> Table<R> {
    /// Reads the header. `separator` where it is known, else the one of comma, semicolon and tab that the header has most of.
    ///
    /// # Errors
    /// When there is no header, or it names two columns alike.
    pub(crate) fn open(input: R, separator: Option<char>) -> Result<Table<R>, Problem> {
        let mut table = Table { lines: Lines::new(input), separator: separator.unwrap_or(','), header: Vec::new() };
        loop {
            let Some(line) = table.lines.next()? else { return Err(Problem::Empty) };
            let text = line.text?;
            if text.trim().is_empty() {
                continue;
            }
            if separator.is_none() {
                let count = |separator: char| text.matches(separator).count();
                table.separator = [',', ';', '\t'].into_iter().rev().max_by_key(|&c| count(c)).unwrap_or(',');
            }
            let mut cells = Cells::default();
            if !cells.read(text, table.separator)? {
                return Err(Problem::OpenQuote);
            }
            table.header = cells.done.iter().map(|name| name.trim().to_owned()).collect();
            let twice =
                table.header.iter().enumerate().find(|(i, name)| table.header.iter().take(*i).any(|n| n == *name));
            return match twice {
                Some((_, name)) => Err(Problem::ColumnTwice { name: name.clone() }),
                None => Ok(table),
            };
        }
    }

    /// The names of the columns.
    pub(crate) fn header(&self) -> &[String] {
        &self.header
    }

    /// The next row, `None` at the end. Blank lines between rows are counted in `blank_lines`.
    ///
    /// # Errors
    /// When the input cannot be read.
    pub(crate) fn next(&mut self, blank_lines: &mut usize) -> Result<Option<Row>, Problem> {
        let mut cells = Cells::default();
        let mut first = None;
        let mut bytes = 0;
        loop {
            let Some(line) = self.lines.next()? else {
                return Ok(first.map(|line| Row { line, object: Err(Problem::OpenQuote) }));
            };
            let number = line.number;
            let text = match line.text {
                Ok(text) => text,
                Err(problem) => return Ok(Some(Row { line: number, object: Err(problem) })),
            };
            if first.is_none() && text.trim().is_empty() {
                *blank_lines += 1;
                continue;
            }
            let line = *first.get_or_insert(number);
            bytes += text.len();
            if bytes > ROW_BYTES_MAX {
                return Ok(Some(Row { line, object: Err(Problem::OpenQuote) }));
            }
            match cells.read(text, self.separator) {
                Ok(false) => cells.cell.push('\n'),
                Ok(true) => return Ok(Some(Row { line, object: self.object(cells.done) })),
                Err(problem) => return Ok(Some(Row { line, object: Err(problem) })),
            }
        }
    }

    fn object(&self, cells: Vec<String>) -> Result<Map<String, Value>, Problem> {
        if cells.len() != self.header.len() {
            return Err(Problem::Cells { found: cells.len(), expected: self.header.len() });
        }
        let cells = self.header.iter().zip(cells).filter(|(_, cell)| !cell.is_empty());
        Ok(cells.map(|(name, cell)| (name.clone(), Value::String(cell))).collect())
    }
}

impl Cells {
    /// Reads one line; false when it ends inside of quotes.
    fn read(&mut self, line: &str, separator: char) -> Result<bool, Problem> {
        for character in line.chars() {
            match (self.place, character) {
                (Place::Start, '"') => self.place = Place::Quoted,
                (Place::Quoted, '"') => self.place = Place::Quote,
                (Place::Quote, '"') => {
                    self.cell.push('"');
                    self.place = Place::Quoted;
                }
                (Place::Quoted, _) => self.cell.push(character),
                (_, _) if character == separator => self.end_cell(),
                (Place::Quote, _) => return Err(Problem::BehindQuote { cell: self.done.len() + 1 }),
                (Place::Start | Place::Plain, _) => {
                    self.cell.push(character);
                    self.place = Place::Plain;
                }
            }
        }
        if self.place == Place::Quoted {
            return Ok(false);
        }
        self.end_cell();
        Ok(true)
    }

    fn end_cell(&mut self) {
        self.done.push(std::mem::take(&mut self.cell));
        self.place = Place::Start;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Vec<(usize, String)> {
        let mut table = Table::open(text.as_bytes(), None).expect("a header");
        let mut found = Vec::new();
        while let Some(row) = table.next(&mut 0).expect("readable") {
            let shown = row.object.map_or_else(|e| format!("! {e}"), |object| Value::Object(object).to_string());
            found.push((row.line, shown));
        }
        found
    }

    #[test]
    fn quotes_hold_separators_line_breaks_and_doubled_quotes() {
        let found = rows("text,category\r\n\"a, \"\"b\"\"\r\nc\",x\r\n\r\nplain \"word\",y\n");
        assert_eq!(found[0], (2, r#"{"text":"a, \"b\"\nc","category":"x"}"#.to_owned()));
        assert_eq!(found[1], (5, r#"{"text":"plain \"word\"","category":"y"}"#.to_owned()));
    }

    #[test]
    fn the_separator_is_the_one_of_the_header() {
        assert_eq!(rows("text;label\na,b;x\n")[0].1, r#"{"text":"a,b","label":"x"}"#);
        assert_eq!(rows("text\tlabel\na,b\tx")[0].1, r#"{"text":"a,b","label":"x"}"#);
    }

    #[test]
    fn broken_rows_are_told_where_they_begin() {
        let found = rows("text,label\na,b,c\n\"a\"b,c\na\n\"open,\nrow,x\n");
        let starts = ["! found 3 cells", "! text stands behind", "! found 1 cells", "! a quote is opened"];
        assert_eq!(found.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 3, 4, 5]);
        for ((_, found), start) in found.iter().zip(starts) {
            assert!(found.starts_with(start), "{found}");
        }
        assert!(matches!(Table::open(&b"\n\n"[..], None), Err(Problem::Empty)));
        assert!(matches!(Table::open(&b"a,a\n"[..], None), Err(Problem::ColumnTwice { .. })));
        assert!(matches!(Table::open(&b"\"a\n"[..], None), Err(Problem::OpenQuote)));
    }
}
