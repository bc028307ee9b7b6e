//! Reads manifests.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use mesh_kubernetes::FromJson;
use serde::Deserialize;
use serde_json::Value;

use super::Key;

/// One document of a manifest.
#[derive(Debug)]
pub(crate) enum Object {
    Node(Box<Node>),
    Namespace(Namespace),
    ServiceAccount(ServiceAccount),
    Service(Box<Service>),
    Pod(Box<Pod>),
    EndpointSlice(EndpointSlice),
    /// A kind that the lab does not interpret and writes for the daemons unchanged.
    Other(Value),
}

/// The text of a YAML file, or of all `*.yaml` and `*.yml` in a folder, by name.
pub(crate) fn read(path: &Path) -> Result<String> {
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    if !path.is_dir() {
        return read(path);
    }
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
        let file = entry
            .with_context(|| format!("cannot read {}", path.display()))?
            .path();
        if file
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml")
        {
            files.push(file);
        }
    }
    if files.is_empty() {
        bail!("no *.yaml in {}", path.display());
    }
    files.sort();
    let texts: Result<Vec<String>> = files.iter().map(|file| read(file)).collect();
    Ok(texts?.join("\n---\n"))
}

/// The documents of a manifest, in the order in which they can be applied. Empty ones are skipped.
pub(crate) fn parse(yaml: &str) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    for (index, document) in serde_yaml_ng::Deserializer::from_str(yaml).enumerate() {
        let position = || format!("document {}", index + 1);
        let value = Value::deserialize(document).with_context(position)?;
        if !value.is_null() {
            objects.push(object(value).with_context(position)?);
        }
    }
    objects.sort_by_key(apply_order);
    Ok(objects)
}

fn object(value: Value) -> Result<Object> {
    let text = |pointer: &str| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let (version, kind, name) = (text("/apiVersion"), text("/kind"), text("/metadata/name"));
    if version.is_empty() || kind.is_empty() || name.is_empty() {
        bail!("an object needs apiVersion, kind and metadata.name");
    }
    let name = format!("{kind} {name}");
    let parsed = match (version, kind) {
        ("v1", "Node") => typed(value).map(Box::new).map(Object::Node),
        ("v1", "Namespace") => typed(value).map(Object::Namespace),
        ("v1", "ServiceAccount") => typed(value).map(Object::ServiceAccount),
        ("v1", "Service") => typed(value).map(Box::new).map(Object::Service),
        ("v1", "Pod") => typed(value).map(Box::new).map(Object::Pod),
        ("discovery.k8s.io/v1", "EndpointSlice") => typed(value).map(Object::EndpointSlice),
        _ => Ok(Object::Other(value)),
    };
    parsed.context(name)
}

fn typed<T: FromJson>(value: Value) -> Result<T> {
    Ok(T::from_json(value)?)
}

/// The position of a kind in the order of application: referenced kinds come first.
fn apply_order(object: &Object) -> u8 {
    match object {
        Object::Node(_) => 0,
        Object::Namespace(_) => 1,
        Object::ServiceAccount(_) => 2,
        Object::Other(_) | Object::EndpointSlice(_) => 3,
        Object::Service(_) => 4,
        Object::Pod(_) => 5,
    }
}

/// Namespace and name of an object of a namespaced kind.
pub(crate) fn key(meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Key {
    let namespace = meta
        .namespace
        .clone()
        .unwrap_or_else(|| "default".to_owned());
    (namespace, meta.name.clone().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_sorted_in_order_of_application() {
        let objects = parse(
            "---\n{apiVersion: v1, kind: Pod, metadata: {name: p}}\n---\n# nothing\n---\n\
             {apiVersion: v1, kind: Node, metadata: {name: n}}\n",
        )
        .unwrap();
        assert!(matches!(objects[..], [Object::Node(_), Object::Pod(_)]));
    }

    #[test]
    fn error_names_document_and_object() {
        let pod = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: 1}}";
        let error = format!("{:#}", parse(pod).unwrap_err());
        assert!(
            error.contains("document 1") && error.contains("Pod p"),
            "{error}"
        );
        assert!(parse("{kind: Pod}").is_err());
        assert!(parse("a: [").is_err());
    }

    #[test]
    fn other_kinds_are_kept() {
        let gateway =
            "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: g}}";
        assert!(matches!(parse(gateway).unwrap()[..], [Object::Other(_)]));
    }
}
