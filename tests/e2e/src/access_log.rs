//! Reads the daemons' access log.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use lab::Lab;

/// How long the line of a closed connection may take to appear.
const DEADLINE: Duration = Duration::from_secs(15);

const SECONDS_PER_DAY: f64 = 86_400.0;

/// One line of the access log: a closed connection.
#[derive(Debug, Clone)]
pub struct Entry {
    /// `info`, or `error` for a failed connection.
    pub level: String,
    /// The message.
    pub message: String,
    /// Field names and unquoted values in the order of the line.
    pub fields: Vec<(String, String)>,
    /// The whole line.
    pub line: String,
}

impl Entry {
    /// The value of a field; empty if the field is absent.
    pub fn field(&self, key: &str) -> &str {
        self.fields
            .iter()
            .find(|(name, _)| name == key)
            .map_or("", |(_, value)| value)
    }

    /// The time of the line, in seconds since midnight UTC.
    pub fn seconds_since_midnight(&self) -> Option<f64> {
        seconds_since_midnight(&self.line)
    }

    /// The time of the line in seconds after `time`, negative if the line is earlier. The two must be
    /// less than half a day apart, because only the time of day is compared.
    pub fn seconds_after(&self, time: SystemTime) -> Option<f64> {
        let time = time.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
        let difference = (self.seconds_since_midnight()? - time).rem_euclid(SECONDS_PER_DAY);
        Some(if difference < SECONDS_PER_DAY / 2.0 {
            difference
        } else {
            difference - SECONDS_PER_DAY
        })
    }

    /// How long the connection was open, in seconds.
    pub fn duration_seconds(&self) -> Option<f64> {
        let millis: f64 = self.field("duration").strip_suffix("ms")?.parse().ok()?;
        Some(millis / 1000.0)
    }

    /// Whether the line has all of these fields with these values.
    pub fn has(&self, fields: &[(&str, &str)]) -> bool {
        fields.iter().all(|(key, value)| self.field(key) == *value)
    }
}

/// The time at the start of a log line, in seconds since midnight UTC.
pub fn seconds_since_midnight(line: &str) -> Option<f64> {
    let (date_and_time, _) = line.split_once(char::is_whitespace)?;
    let (_, time) = date_and_time.split_once('T')?;
    let parts = time.trim_end_matches('Z').split(':').map(str::parse::<f64>);
    let parts: Vec<f64> = parts.collect::<Result<_, _>>().ok()?;
    let [hours, minutes, seconds] = parts[..] else {
        return None;
    };
    Some(hours * 3600.0 + minutes * 60.0 + seconds)
}

/// The access-log lines of a daemon's log in the plain format. Other lines are skipped.
pub fn parse(log: &str) -> Vec<Entry> {
    log.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Entry> {
    let mut columns = line.splitn(5, '\t').skip(1);
    let (level, scope) = (columns.next()?, columns.next()?);
    if scope != "access" {
        return None;
    }
    let (message, fields) = (columns.next()?, columns.next()?);
    let (level, message) = (level.to_owned(), message.to_owned());
    Some(Entry {
        level,
        message,
        fields: parse_fields(fields),
        line: line.to_owned(),
    })
}

/// Parses `key=value` and `key="value"`, separated by spaces.
fn parse_fields(mut text: &str) -> Vec<(String, String)> {
    let mut parsed = Vec::new();
    while let Some((key, rest)) = text.split_once('=') {
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let (value, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                (value.to_owned(), rest)
            }
        };
        parsed.push((key.trim_start().to_owned(), value));
        text = rest;
    }
    parsed
}

/// The unescaped text up to the closing quote, and the rest after it.
fn unquote(quoted: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            _ => value.push(c),
        }
    }
    (value, "")
}

/// The access-log lines of a node's daemon.
///
/// # Errors
/// The daemon has no log.
pub fn lines(lab: &Lab, node: &str) -> Result<Vec<Entry>> {
    Ok(parse(&lab.daemon_log(node)?))
}

/// Waits for a line with all of these fields in the log of a node's daemon. Returns the line.
///
/// # Errors
/// There is none after 15 s; the error has the last 20 lines.
pub fn wait(lab: &Lab, node: &str, fields: &[(&str, &str)]) -> Result<Entry> {
    let what = format!("an access-log line of node {node} with {fields:?}");
    lab.wait_until(&what, DEADLINE, || {
        lines(lab, node)
            .ok()?
            .into_iter()
            .find(|line| line.has(fields))
    })
    .with_context(|| {
        let lines = lines(lab, node).unwrap_or_default();
        let lines: Vec<_> = lines
            .iter()
            .rev()
            .take(20)
            .map(|line| line.line.clone())
            .collect();
        format!("the last lines are\n{}", lines.join("\n"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_with_bare_and_quoted_values_is_parsed() {
        let line = "2026-01-02T03:04:05.000006Z\tinfo\taccess\tconnection complete\t\
                    src.addr=10.0.0.1:80 error=\"a \\\"b\\\" c\" bytes_sent=7 reason=\"ok\"";
        let lines = parse(&format!("2026Z\tinfo\tstart\thello\n{line}\n"));
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].message, "connection complete");
        assert!(lines[0].has(&[
            ("src.addr", "10.0.0.1:80"),
            ("bytes_sent", "7"),
            ("reason", "ok")
        ]));
        assert_eq!(lines[0].field("error"), "a \"b\" c");
        assert_eq!(lines[0].field("dst.addr"), "");
        assert_eq!(
            lines[0].seconds_since_midnight(),
            Some(3.0 * 3600.0 + 4.0 * 60.0 + 5.000_006)
        );
    }

    #[test]
    fn seconds_after_works_across_midnight() {
        let line = "2026-01-02T00:00:01Z\tinfo\taccess\tconnection complete\tduration=\"1500ms\"";
        let line = &parse(line)[0];
        // 2026-01-02 began 20,455 days after the epoch.
        let midnight = UNIX_EPOCH + Duration::from_secs(20_455 * 86_400);
        let second = Duration::from_secs(1);
        assert_eq!(line.seconds_after(midnight - second), Some(2.0));
        assert_eq!(line.seconds_after(midnight + 3 * second), Some(-2.0));
        assert_eq!(line.duration_seconds(), Some(1.5));
    }
}
