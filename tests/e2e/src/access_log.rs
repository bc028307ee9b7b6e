//! The daemon's access log, read as an operator reads it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use lab::Lab;

/// How long after the end of a connection its line may take to appear.
const DEADLINE: Duration = Duration::from_secs(15);

/// Seconds of a day.
const DAY: f64 = 86_400.0;

/// One line: a connection that has ended.
#[derive(Debug, Clone)]
pub struct Entry {
    /// `info`, or `error` for a connection that failed.
    pub level: String,
    /// The line's message.
    pub message: String,
    /// Names and values in the order of the line; quotes removed.
    pub fields: Vec<(String, String)>,
    /// The line itself.
    pub line: String,
}

impl Entry {
    /// The value of a field; empty if the line does not have it.
    pub fn field(&self, key: &str) -> &str {
        self.fields
            .iter()
            .find(|(name, _)| name == key)
            .map_or("", |(_, value)| value)
    }

    /// When it was written, in seconds since midnight UTC.
    pub fn seconds_since_midnight(&self) -> Option<f64> {
        seconds_since_midnight(&self.line)
    }

    /// How many seconds after this time it was written; negative if before. Half a day at most.
    pub fn seconds_after(&self, time: SystemTime) -> Option<f64> {
        let time = time.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
        let apart = (self.seconds_since_midnight()? - time).rem_euclid(DAY);
        Some(if apart < DAY / 2.0 {
            apart
        } else {
            apart - DAY
        })
    }

    /// How many seconds the connection was open.
    pub fn duration_seconds(&self) -> Option<f64> {
        let millis: f64 = self.field("duration").strip_suffix("ms")?.parse().ok()?;
        Some(millis / 1000.0)
    }

    /// Whether the line has all of these fields with these values.
    pub fn has(&self, fields: &[(&str, &str)]) -> bool {
        fields.iter().all(|(key, value)| self.field(key) == *value)
    }
}

/// The time at the beginning of a line of any log of ours, in seconds since midnight UTC.
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

/// The access-log lines of a daemon's log in its plain format; other lines are left out.
pub fn parse(log: &str) -> Vec<Entry> {
    log.lines().filter_map(access).collect()
}

fn access(line: &str) -> Option<Entry> {
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
        fields: pairs(fields),
        line: line.to_owned(),
    })
}

/// `key=value` and `key="value"`, separated by spaces.
fn pairs(mut text: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    while let Some((key, rest)) = text.split_once('=') {
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let (value, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                (value.to_owned(), rest)
            }
        };
        pairs.push((key.trim_start().to_owned(), value));
        text = rest;
    }
    pairs
}

/// The text up to the closing quote, and what follows it.
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

/// The lines so far of one node's daemon.
///
/// # Errors
/// The node has no log.
pub fn lines(lab: &Lab, node: &str) -> Result<Vec<Entry>> {
    Ok(parse(&lab.daemon_log(node)?))
}

/// Waits for a line with all of these fields in the log of a node's daemon, and returns it.
///
/// # Errors
/// There is none after 15 s; the error shows the lines that there are.
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
    fn a_line_is_read_with_bare_and_quoted_values() {
        let line = "2026-01-02T03:04:05.000006Z\tinfo\taccess\tconnection complete\t\
                    src.addr=10.0.0.1:80 error=\"a \\\"b\\\" c\" bytes_sent=7 reason=\"ok\"";
        let all = parse(&format!("2026Z\tinfo\tstart\thello\n{line}\n"));
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].message, "connection complete");
        assert!(all[0].has(&[
            ("src.addr", "10.0.0.1:80"),
            ("bytes_sent", "7"),
            ("reason", "ok")
        ]));
        assert_eq!(all[0].field("error"), "a \"b\" c");
        assert_eq!(all[0].field("dst.addr"), "");
        assert_eq!(
            all[0].seconds_since_midnight(),
            Some(3.0 * 3600.0 + 4.0 * 60.0 + 5.000_006)
        );
    }

    #[test]
    fn a_line_is_dated_across_midnight() {
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
