//! Reads the rules of an AuthorizationPolicy.
//!
//! Two kinds of "empty" must not be confused: an invalid constraint is left out, and a match without
//! constraints matches everything; a match of HTTP attributes only is left out, and a clause without
//! matches matches nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::matching::{Clause, Constraint, Match, Rule};
use crate::policy::document::{Field, Reader};
use crate::policy::trust_domains::TrustDomains;

use super::Action;
use super::attributes::{self, Attribute, Key};

/// The HTTP attributes that the rules use.
#[derive(Debug, Default)]
pub(super) struct HttpAttributes {
    found: BTreeSet<String>,
    /// A DENY rule has a clause of HTTP attributes only, so it denies nothing.
    pub(super) deny_nothing: bool,
}

impl HttpAttributes {
    /// Their names, if there are any.
    pub(super) fn list(&self) -> Option<String> {
        let names: Vec<&str> = self.found.iter().map(String::as_str).collect();
        (!names.is_empty()).then(|| names.join(", "))
    }
}

/// Reads the rules of one policy.
pub(super) struct RuleReader<'r, 'f> {
    reader: &'r mut Reader<'f>,
    namespace: Arc<str>,
    trust_domains: &'r TrustDomains,
    http: HttpAttributes,
    /// The number of HTTP attributes read so far.
    http_count: usize,
}

impl<'r, 'f> RuleReader<'r, 'f> {
    pub(super) fn new(
        reader: &'r mut Reader<'f>,
        namespace: &Arc<str>,
        trust_domains: &'r TrustDomains,
    ) -> Self {
        Self {
            reader,
            namespace: namespace.clone(),
            trust_domains,
            http: HttpAttributes::default(),
            http_count: 0,
        }
    }

    pub(super) fn into_http(self) -> HttpAttributes {
        self.http
    }

    /// Reads the valid parts of the rules of a DENY policy. The rules of an ALLOW policy may only be
    /// used if there is no error.
    pub(super) fn read(&mut self, spec: &Field<'_>, action: Action) -> Vec<Rule> {
        let written = spec.value.get("rules");
        let none = written.is_none_or(|rules| rules.as_array().is_some_and(Vec::is_empty));
        if none && action != Action::Deny {
            return Vec::new();
        }
        if written.is_none() {
            let message = "DENY without rules would refuse nothing; taken to refuse everything \
                           (which is written as one empty rule)";
            let field = spec.get_or_null("rules");
            field.error("empty_match", message.to_owned(), self.reader);
            return vec![Rule::default()];
        }
        let Some(items) = self.list(spec, "rules") else {
            return vec![Rule::default()];
        };
        let rules = items.iter().filter_map(|item| self.rule(item, action));
        rules.collect()
    }

    /// Reads a rule; `None` for an ALLOW rule with HTTP attributes, which is left out.
    fn rule(&mut self, field: &Field<'_>, action: Action) -> Option<Rule> {
        if !self.is_object(field) {
            return Some(Rule::default());
        }
        field.expect_keys(&["from", "to", "when"], self.reader);
        let http_count = self.http_count;
        let mut clauses = Vec::new();
        clauses.extend(self.alternatives(field, "to", "operation", Self::operation));
        clauses.extend(self.alternatives(field, "from", "source", Self::source));
        if field.value.get("when").is_some() {
            for condition in self.list(field, "when").unwrap_or_default() {
                clauses.extend(self.condition(&condition));
            }
        }
        if action == Action::Allow && self.http_count > http_count {
            return None;
        }
        self.http.deny_nothing |= clauses.iter().any(|clause| clause.0.is_empty());
        Some(Rule(clauses))
    }

    /// Reads `from` or `to`: one of the entries must match. `None` if the clause is missing or invalid.
    fn alternatives(
        &mut self,
        rule: &Field<'_>,
        key: &str,
        inner: &str,
        read: fn(&mut Self, &Field<'_>) -> Option<Match>,
    ) -> Option<Clause> {
        rule.value.get(key)?;
        let mut matches = Vec::new();
        for entry in self.list(rule, key)? {
            if !self.is_object(&entry) {
                matches.push(Match::default());
                continue;
            }
            entry.expect_keys(&[inner], self.reader);
            let field = entry.get_or_null(inner);
            match self.is_object(&field) {
                true => matches.extend(read(self, &field)),
                false => matches.push(Match::default()),
            }
        }
        Some(Clause(matches))
    }

    fn source(&mut self, field: &Field<'_>) -> Option<Match> {
        let found = self.one_match(field, &attributes::SOURCE, &attributes::HTTP_SOURCE);
        let has = |keys: &[&str]| keys.iter().any(|key| field.value.get(key).is_some());
        let accounts = has(&["serviceAccounts", "notServiceAccounts"]);
        let others = ["principals", "notPrincipals", "namespaces", "notNamespaces"];
        if !accounts || !has(&others) {
            return found;
        }
        let message = "serviceAccounts cannot be combined with principals or namespaces".to_owned();
        field.error("bad_field", message, self.reader);
        found.map(|mut found| {
            found
                .0
                .retain(|constraint| !constraint.values.is_identity());
            found
        })
    }

    fn operation(&mut self, field: &Field<'_>) -> Option<Match> {
        self.one_match(field, &attributes::OPERATION, &attributes::HTTP_OPERATION)
    }

    /// Reads an entry, all of whose fields must match. `None` if it has HTTP attributes only.
    fn one_match(
        &mut self,
        field: &Field<'_>,
        known: &[(&str, &str, Attribute)],
        http: &[&str],
    ) -> Option<Match> {
        let (before, http_count) = (self.reader.count(), self.http_count);
        let keys = known.iter().flat_map(|(key, not, _)| [*key, *not]);
        let keys: Vec<&str> = keys.chain(http.iter().copied()).collect();
        field.expect_keys(&keys, self.reader);
        let mut has_field = false;
        let mut constraints = Vec::new();
        for (key, not, attribute) in known {
            for (key, negated) in [(*key, false), (*not, true)] {
                if field.value.get(key).is_some() {
                    has_field = true;
                    constraints.extend(self.constraint(field, key, *attribute, negated));
                }
            }
        }
        for key in http {
            self.http(field, key, key);
        }
        if !has_field && self.reader.count() == before {
            if self.http_count > http_count {
                return None;
            }
            let message = "matches nothing in particular; leave it out to match everything";
            field.error("empty_match", message.to_owned(), self.reader);
        }
        Some(Match(constraints))
    }

    /// Reads one entry of `when`; `None` if it is invalid.
    fn condition(&mut self, field: &Field<'_>) -> Option<Clause> {
        if !self.is_object(field) {
            return None;
        }
        let before = self.reader.count();
        field.expect_keys(&["key", "values", "notValues"], self.reader);
        let key_field = field.get_or_null("key");
        let key = key_field.text(self.reader)?;
        let has = |key| field.value.get(key).is_some();
        if !has("values") && !has("notValues") {
            let message = "has neither values nor notValues".to_owned();
            field.error("empty_match", message, self.reader);
        }
        match attributes::key(key) {
            Key::Known(attribute) => {
                let mut constraints = Vec::new();
                for (list, negated) in [("values", false), ("notValues", true)] {
                    if has(list) {
                        constraints.extend(self.constraint(field, list, attribute, negated));
                    }
                }
                Some(Clause(vec![Match(constraints)]))
            }
            Key::Http => {
                self.http(field, "values", key);
                self.http(field, "notValues", key);
                (self.reader.count() == before).then(|| Clause(Vec::new()))
            }
            Key::Unknown => {
                let message = format!("{key:?} is not a known attribute");
                key_field.error("unknown_attribute", message, self.reader);
                None
            }
        }
    }

    /// Reads a constraint; `None` if it is invalid. A negated constraint keeps its valid values.
    fn constraint(
        &mut self,
        parent: &Field<'_>,
        key: &str,
        attribute: Attribute,
        negated: bool,
    ) -> Option<Constraint> {
        let mut values = attribute.no_values();
        let mut certain = true;
        for item in self.list(parent, key)? {
            let read = match item.text(self.reader) {
                None => false,
                Some(text) => match values.add(text, &self.namespace, self.trust_domains) {
                    Ok(()) => true,
                    Err(message) => {
                        item.error("bad_value", message, self.reader);
                        false
                    }
                },
            };
            certain &= read;
        }
        let usable = !values.is_empty() && (certain || negated);
        usable.then_some(Constraint { values, negated })
    }

    /// Checks a list of HTTP attribute values, which no connection is compared with.
    fn http(&mut self, parent: &Field<'_>, list: &str, name: &str) {
        if parent.value.get(list).is_none() {
            return;
        }
        self.http_count += 1;
        self.http.found.insert(name.to_owned());
        for item in self.list(parent, list).unwrap_or_default() {
            if item.text(self.reader) == Some("") {
                item.error("bad_value", "is empty".to_owned(), self.reader);
            }
        }
    }

    /// The items of a field that must be a list with items.
    fn list<'a>(&mut self, parent: &'a Field<'a>, key: &'a str) -> Option<Vec<Field<'a>>> {
        match parent.value.get(key).and_then(|value| value.as_array()) {
            Some(items) if !items.is_empty() => Some(parent.items(key, self.reader).collect()),
            Some(_) => {
                let message = "is an empty list; leave it out to match everything".to_owned();
                let field = parent.get_or_null(key);
                field.error("empty_match", message, self.reader);
                None
            }
            None => {
                let field = parent.get_or_null(key);
                field.error("bad_field", "is not a list".to_owned(), self.reader);
                None
            }
        }
    }

    fn is_object(&mut self, field: &Field<'_>) -> bool {
        if !field.value.is_object() {
            field.error("bad_field", "is not an object".to_owned(), self.reader);
        }
        field.value.is_object()
    }
}
