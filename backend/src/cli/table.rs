//! Tables for people: aligned columns, sizes and times with their units.

/// How a column stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows under a header; the last column is never padded.
pub(super) struct Table {
    header: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(header: &[(&'static str, Align)]) -> Table {
        Table { header: header.to_vec(), rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.header.len(), "one cell for each column");
        self.rows.push(cells);
    }

    pub(super) fn text(&self) -> String {
        let widths: Vec<usize> = self
            .header
            .iter()
            .enumerate()
            .map(|(column, (name, _))| {
                let cells = self.rows.iter().map(|row| row[column].chars().count());
                cells.chain([name.len()]).max().unwrap_or(0)
            })
            .collect();
        let header: Vec<String> = self.header.iter().map(|(name, _)| (*name).to_owned()).collect();
        let mut text = String::new();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                if self.header[column].1 == Align::Left {
                    line.push_str(&format!("{cell:<width$}  "));
                } else {
                    line.push_str(&format!("{cell:>width$}  "));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `4 GiB`, `1.5 MiB`, `512 B`.
pub(super) fn bytes(count: u64) -> String {
    scaled(count, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024)
}

/// `12.3 M`: counts of requests.
pub(super) fn count(count: u64) -> String {
    scaled(count, &["", "k", "M", "G", "T"], 1000).trim_end().to_owned()
}

/// `85 us`, `1.2 ms`, `3 s`.
pub(super) fn duration_ns(ns: u64) -> String {
    if ns == 0 { "-".to_owned() } else { scaled(ns, &["ns", "us", "ms", "s"], 1000) }
}

/// `3 d 4 h`, `5 min 7 s`.
pub(super) fn duration_seconds(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// One digit after the point where it is not 0 and the number is below 100.
fn scaled(count: u64, units: &[&str], step: u64) -> String {
    let mut divisor = 1u64;
    let mut unit = 0;
    while count / divisor >= step && unit + 1 < units.len() {
        divisor = divisor.saturating_mul(step);
        unit += 1;
    }
    let whole = count / divisor;
    let tenth = count % divisor * 10 / divisor;
    if tenth == 0 || whole >= 100 {
        format!("{whole} {}", units[unit])
    } else {
        format!("{whole}.{tenth} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_clean() {
        let mut table = Table::new(&[("NAME", Align::Left), ("SIZE", Align::Right), ("SOCKET", Align::Left)]);
        table.row(vec!["vm1-root".into(), "4 GiB".into(), "/run/a".into()]);
        table.row(vec!["b".into(), "512 MiB".into(), String::new()]);
        assert_eq!(table.text(), "NAME         SIZE  SOCKET\nvm1-root    4 GiB  /run/a\nb         512 MiB\n");
    }

    #[test]
    fn numbers_have_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(4 << 30), "4 GiB");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16383 PiB");
        assert_eq!(count(999), "999");
        assert_eq!(count(12_345_678), "12.3 M");
        assert_eq!(duration_ns(0), "-");
        assert_eq!(duration_ns(85_400), "85.4 us");
        assert_eq!(duration_ns(3_000_000_000), "3 s");
        assert_eq!(duration_seconds(59), "59 s");
        assert_eq!(duration_seconds(3661), "1 h 1 min");
        assert_eq!(duration_seconds(90_000), "1 d 1 h");
    }
}
