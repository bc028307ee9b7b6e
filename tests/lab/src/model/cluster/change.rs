//! Deletes objects and changes their labels.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use super::{Cluster, find};
use crate::model::service;

impl Cluster {
    /// Removes an object that is not a pod.
    pub(crate) fn delete(&mut self, kind: &str, name: &str) -> Result<()> {
        match kind.to_ascii_lowercase().as_str() {
            "service" => {
                let key = find(&self.services, "service", name)?;
                if let Some(service) = self.services.remove(&key) {
                    self.release_service_ips(&service::cluster_ips(&service));
                }
            }
            "serviceaccount" => {
                let key = find(&self.service_accounts, "service account", name)?;
                self.service_accounts.remove(&key);
            }
            "endpointslice" => {
                let key = find(&self.slices, "endpoint slice", name)?;
                self.slices.remove(&key);
            }
            "namespace" => self.delete_namespace(name)?,
            "node" => bail!("a node cannot be deleted from a lab"),
            kind => {
                let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
                let matches = |key: &(String, String, String)| {
                    key.0.eq_ignore_ascii_case(kind)
                        && (key.1.is_empty() || key.1 == namespace)
                        && key.2 == name
                };
                let key = self.others.keys().find(|key| matches(key)).cloned();
                let key = key.with_context(|| format!("there is no {kind} {namespace}/{name}"))?;
                self.others.remove(&key);
            }
        }
        Ok(())
    }

    /// Deletes a namespace with everything in it. Its pods must be removed already.
    fn delete_namespace(&mut self, name: &str) -> Result<()> {
        self.namespaces
            .remove(name)
            .with_context(|| format!("there is no namespace {name}"))?;
        let services: Vec<_> = self
            .services
            .keys()
            .filter(|key| key.0 == name)
            .cloned()
            .collect();
        for key in services {
            self.delete("service", &format!("{}/{}", key.0, key.1))?;
        }
        self.service_accounts.retain(|key, _| key.0 != name);
        self.slices.retain(|key, _| key.0 != name);
        self.others.retain(|key, _| key.1 != name);
        Ok(())
    }

    /// Sets and removes labels of an object.
    pub(crate) fn label(
        &mut self,
        kind: &str,
        name: &str,
        labels: &BTreeMap<String, Option<String>>,
    ) -> Result<()> {
        let meta = match kind.to_ascii_lowercase().as_str() {
            "node" => self
                .nodes
                .get_mut(name)
                .map(|entry| &mut entry.object.metadata),
            "namespace" => self
                .namespaces
                .get_mut(name)
                .map(|object| &mut object.metadata),
            "pod" => {
                let key = self.find_pod(name)?;
                self.pods
                    .get_mut(&key)
                    .map(|entry| &mut entry.object.metadata)
            }
            "service" => {
                let key = find(&self.services, "service", name)?;
                self.services
                    .get_mut(&key)
                    .map(|object| &mut object.metadata)
            }
            "serviceaccount" => {
                let key = find(&self.service_accounts, "service account", name)?;
                self.service_accounts
                    .get_mut(&key)
                    .map(|object| &mut object.metadata)
            }
            _ => bail!("labels of a {kind} cannot be changed: apply the object again"),
        };
        let meta = meta.with_context(|| format!("there is no {kind} {name}"))?;
        let current = meta.labels.get_or_insert_default();
        for (key, value) in labels {
            match value {
                Some(value) => current.insert(key.clone(), value.clone()),
                None => current.remove(key),
            };
        }
        Ok(())
    }
}
