//! Any client reaches any server, and only what must be encrypted is.

use std::collections::BTreeMap;

use ambit_e2e::detector::Detector;
use ambit_e2e::matrix::{self, Cell, Request};
use anyhow::Result;
use lab::{Lab, Options};

/// Cells that fail, by name, with why.
type Failures = BTreeMap<String, String>;

fn note(failures: &mut Failures, cell: &Cell, result: Result<()>) {
    if let Err(error) = result {
        let why = failures.entry(cell.to_string()).or_default();
        why.push_str(&format!("\n    {error:#}"));
    }
}

fn request_all(lab: &Lab, cells: &[Cell], failures: &mut Failures) -> Vec<Request> {
    let mut requests = Vec::new();
    for (index, cell) in cells.iter().enumerate() {
        match matrix::request(lab, *cell, index) {
            Ok(request) => requests.push(request),
            Err(error) => note(failures, cell, Err(error)),
        }
    }
    requests
}

fn report(failures: Failures, cells: usize) {
    let text: Vec<String> = failures
        .iter()
        .map(|(cell, why)| format!("  {cell}:{why}"))
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {cells} cells fail:\n{}",
        text.len(),
        text.join("\n")
    );
}

#[test]
fn every_client_reaches_every_server_with_its_own_address_and_identity_and_nothing_in_clear() {
    let lab = Lab::up(matrix::manifests(), Options::default()).unwrap();
    let detector = Detector::start(&lab).unwrap();
    let cells = Cell::all();
    let mut failures = Failures::new();
    let requests = request_all(&lab, &cells, &mut failures);
    for request in &requests {
        note(
            &mut failures,
            &request.cell,
            matrix::check_request(&lab, request),
        );
        note(
            &mut failures,
            &request.cell,
            matrix::check_wire(&detector, request),
        );
    }
    // A pair of pods has six cells: two families, three ways to name the server.
    for six in requests.chunk_by(|x, y| {
        x.cell.client_pod() == y.cell.client_pod() && x.cell.server_pod() == y.cell.server_pod()
    }) {
        let count = u32::try_from(six.len()).unwrap();
        note(
            &mut failures,
            &six[0].cell,
            matrix::check_counts(&lab, &six[0].cell, count),
        );
    }
    report(failures, cells.len());
    lab.down().unwrap();
}

#[test]
fn the_same_pods_without_a_mesh_reach_each_other_in_clear_and_the_detector_sees_all_of_it() {
    let lab = Lab::up(matrix::manifests(), Options::without_daemons()).unwrap();
    let detector = Detector::start(&lab).unwrap();
    // To these pods of a lab without daemons "meshed" is only the name of a namespace.
    let cells: Vec<Cell> = Cell::all()
        .into_iter()
        .filter(|cell| !cell.client_meshed && !cell.server_meshed)
        .collect();
    let mut failures = Failures::new();
    let requests = request_all(&lab, &cells, &mut failures);
    for request in &requests {
        note(
            &mut failures,
            &request.cell,
            matrix::check_request(&lab, request),
        );
        note(
            &mut failures,
            &request.cell,
            matrix::check_wire(&detector, request),
        );
    }
    report(failures, cells.len());
    lab.down().unwrap();
}
