//! What no socket shows: the hot path's own time, by the benches of the crate `hawser-volume`.
//!
//! Owns: running them, and reading the lines that have a goal. Must not know: what they measure.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::sys;

/// The benches.
pub const BENCHES: [&str; 3] = ["resolve", "open", "parity"];
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(600);

/// A line that has a goal.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// What was measured.
    pub name: String,
    /// The numbers, as they were printed.
    pub numbers: [String; 2],
    /// The goal, with its sign.
    pub goal: String,
    /// Whether it was reached.
    pub reached: bool,
}

/// Builds them, where cargo finds what it needs.
pub fn build() -> Result<(), String> {
    let status = cargo(&["--no-run"], &BENCHES).status().map_err(|e| format!("cargo: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("cargo bench --no-run: {status}")) }
}

/// Runs one on this CPU; its lines that have a goal.
pub fn run(bench: &str, cpu: usize) -> Result<Vec<Line>, String> {
    let mut command = cargo(&[], &[bench]);
    let folder = sys::TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let path = folder.path().join("out");
    let out = std::fs::File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    command.stdin(Stdio::null()).stdout(out).stderr(Stdio::inherit());
    let mut child = sys::spawn_group(command, Some(cpu)).map_err(|e| e.to_string())?;
    let status = child.wait(LIMIT).map_err(|e| e.to_string())?;
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    eprint!("{text}");
    if !status.success() {
        return Err(format!("cargo bench --bench {bench}: {status}"));
    }
    let lines: Vec<Line> = text.lines().filter_map(parse).collect();
    if lines.is_empty() {
        Err(format!("cargo bench --bench {bench}: no line with a goal"))
    } else {
        Ok(lines)
    }
}

fn cargo(more: &[&str], benches: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR"))).args([
        "bench",
        "--quiet",
        "--package",
        "hawser-volume",
    ]);
    for bench in benches {
        command.args(["--bench", bench]);
    }
    command.args(more);
    command
}

/// `name   number   number   ≤ goal, reached`, or one number, with two spaces or more between them.
fn parse(line: &str) -> Option<Line> {
    let words: Vec<&str> = line.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect();
    let (name, first, second, last) = match words[..] {
        [name, first, second, last] => (name, first, second, last),
        [name, first, last] => (name, first, "", last),
        _ => return None,
    };
    let (goal, verdict) = last.rsplit_once(", ")?;
    let reached = match verdict {
        "reached" => true,
        "MISSED" => false,
        _ => return None,
    };
    Some(Line {
        name: name.to_owned(),
        numbers: [first.to_owned(), second.to_owned()],
        goal: goal.to_owned(),
        reached,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_a_goal_are_read_and_others_are_not() {
        let line = "resolve, 4k read, thin + raid5 on 3, warm                   21.3 ns       22.0 ns   ≤ 40 ns, reached";
        let line = parse(line).expect("a goal");
        assert_eq!(line.name, "resolve, 4k read, thin + raid5 on 3, warm");
        assert_eq!(
            (line.numbers, line.goal.as_str()),
            (["21.3 ns".to_owned(), "22.0 ns".to_owned()], "≤ 40 ns")
        );
        assert!(line.reached);
        let line = parse(
            "P+Q on 6 members, avx2                                        10.51     0.38×   ≥ 0.4, MISSED",
        );
        assert!(line.is_some_and(|line| !line.reached && line.numbers[1] == "0.38×"));
        let line = parse(
            "open of a pool with 65536 GiB mapped                 2.813 s                  ≤ 10 s, reached",
        );
        assert!(line.is_some_and(|line| line.reached && line.numbers == ["2.813 s", ""]));
        assert_eq!(
            parse("                                                best        middle          goal"),
            None
        );
        assert_eq!(
            parse("XOR on 3 members, scalar                                       4.51     0.18×   "),
            None
        );
    }
}
