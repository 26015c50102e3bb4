//! Tables of text that fit the terminal.

use crate::terminal::{Paint, Tone};

/// Between two columns.
const GAP: &str = "  ";

/// No column of text is cut below this many characters.
const TEXT_COLUMN_MIN: usize = 8;

/// Which side a column leans to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

#[derive(Debug)]
struct Column {
    title: &'static str,
    align: Align,
    /// Left out, last one first, when the terminal is too narrow.
    droppable: bool,
}

/// One field of a table.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// Text in a tone.
    pub(crate) fn new(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Cell::new(text, Tone::Plain)
    }
}

/// Rows under titles.
#[derive(Debug, Default)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// Adds a column of text.
    pub(crate) fn text(self, title: &'static str) -> Self {
        self.column(title, Align::Left, false)
    }

    /// Adds a column of numbers.
    pub(crate) fn number(self, title: &'static str) -> Self {
        self.column(title, Align::Right, false)
    }

    /// Adds a column that a narrow terminal can do without.
    pub(crate) fn optional(self, title: &'static str, align: Align) -> Self {
        self.column(title, align, true)
    }

    fn column(mut self, title: &'static str, align: Align, droppable: bool) -> Self {
        self.columns.push(Column { title, align, droppable });
        self
    }

    /// Adds a row with one cell for each column.
    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.columns.len(), "a row has one cell for each column");
        self.rows.push(cells);
    }

    /// Draws the table, each line ended by a new line, within `width` columns if that is at all possible: the widest
    /// columns of text are cut first, then optional columns are left out.
    pub(crate) fn render(&self, width: Option<usize>, paint: Paint) -> String {
        let mut shown: Vec<usize> = (0..self.columns.len()).collect();
        let mut widths: Vec<usize> = (0..self.columns.len()).map(|index| self.natural_width(index)).collect();
        if let Some(width) = width {
            loop {
                let excess = total(&widths, &shown).saturating_sub(width);
                if excess == 0 || self.cut_text(&mut widths, &shown, excess) {
                    break;
                }
                let Some(at) = shown.iter().rposition(|index| self.columns[*index].droppable) else { break };
                shown.remove(at);
            }
        }
        let titles: Vec<Cell> =
            self.columns.iter().map(|column| Cell::new(column.title, Tone::Faint)).collect();
        let mut drawn = String::new();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = String::new();
            for (position, index) in shown.iter().enumerate() {
                if position > 0 {
                    line.push_str(GAP);
                }
                let is_last = position + 1 == shown.len();
                line.push_str(&draw(
                    &row[*index],
                    self.columns[*index].align,
                    widths[*index],
                    is_last,
                    paint,
                ));
            }
            drawn.push_str(line.trim_end());
            drawn.push('\n');
        }
        drawn
    }

    fn natural_width(&self, index: usize) -> usize {
        let cells = self.rows.iter().map(|row| row[index].width());
        cells.chain([self.columns[index].title.chars().count()]).max().unwrap_or(0)
    }

    /// Takes `excess` characters from columns of text, the widest first. `false` if they do not have that many.
    fn cut_text(&self, widths: &mut [usize], shown: &[usize], excess: usize) -> bool {
        let mut cut = widths.to_vec();
        for _ in 0..excess {
            let widest = shown
                .iter()
                .filter(|index| self.columns[**index].align == Align::Left && cut[**index] > TEXT_COLUMN_MIN)
                .max_by_key(|index| cut[**index]);
            match widest {
                Some(index) => cut[*index] -= 1,
                None => return false,
            }
        }
        widths.copy_from_slice(&cut);
        true
    }
}

fn total(widths: &[usize], shown: &[usize]) -> usize {
    shown.iter().map(|index| widths[*index]).sum::<usize>() + GAP.len() * shown.len().saturating_sub(1)
}

fn draw(cell: &Cell, align: Align, width: usize, is_last: bool, paint: Paint) -> String {
    let mut text = cell.text.clone();
    if cell.width() > width {
        text = text.chars().take(width.saturating_sub(1)).collect();
        text.push('…');
    }
    let padding = " ".repeat(width - text.chars().count());
    let painted = paint.tone(cell.tone, &text);
    match align {
        Align::Right => padding + &painted,
        Align::Left if is_last => painted,
        Align::Left => painted + &padding,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::default().text("NAME").number("COUNT").optional("NOTE", Align::Left);
        table.row(vec!["a".into(), "1".into(), "short".into()]);
        table.row(vec![
            Cell::new("a-rather-long-name", Tone::Good),
            "12345".into(),
            "a note at the end".into(),
        ]);
        table
    }

    #[test]
    fn columns_line_up_and_lines_end_without_blanks() {
        insta::assert_snapshot!(table().render(None, Paint::NONE), @r"
        NAME                COUNT  NOTE
        a                       1  short
        a-rather-long-name  12345  a note at the end
        ");
    }

    #[test]
    fn a_narrow_terminal_cuts_text_first() {
        insta::assert_snapshot!(table().render(Some(32), Paint::NONE), @r"
        NAME          COUNT  NOTE
        a                 1  short
        a-rather-lo…  12345  a note at …
        ");
    }

    #[test]
    fn a_narrower_one_loses_optional_columns() {
        insta::assert_snapshot!(table().render(Some(20), Paint::NONE), @r"
        NAME           COUNT
        a                  1
        a-rather-lon…  12345
        ");
    }

    #[test]
    fn width_is_kept_whenever_it_can_be() {
        for width in 15..60 {
            for line in table().render(Some(width), Paint::NONE).lines() {
                assert!(line.chars().count() <= width, "{width}: {line}");
            }
        }
    }

    #[test]
    fn color_does_not_change_the_layout() {
        let colored = table().render(None, Paint { on: true });
        assert!(colored.contains("\x1b[32ma-rather-long-name\x1b[0m  12345"), "{colored}");
        assert!(colored.contains("a                       1  short"), "{colored}");
    }
}
