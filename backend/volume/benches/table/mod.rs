//! Lines that people read, and `cargo xtask bench`.

/// A line of the table; `goal` is the most that is good.
pub(crate) fn line(name: &str, best: f64, middle: Option<f64>, unit: &str, goal: Option<f64>) {
    let number = |value: f64| match value {
        10.0.. => format!("{value:.1} {unit}"),
        _ => format!("{value:.3} {unit}"),
    };
    let verdict = match goal {
        Some(goal) if best <= goal => format!("≤ {goal} {unit}, reached"),
        Some(goal) => format!("≤ {goal} {unit}, MISSED"),
        None => String::new(),
    };
    println!("{name:52}{:>14}{:>14}   {verdict}", number(best), middle.map(number).unwrap_or_default());
}
