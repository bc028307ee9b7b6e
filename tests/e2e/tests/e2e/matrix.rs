//! Every client reaches every server, and exactly the connections between meshed pods are encrypted.

use std::collections::BTreeMap;

use ambit_e2e::detector::Detector;
use ambit_e2e::matrix::{self, Cell, Request};
use anyhow::Result;
use lab::{Lab, Options};

/// Error texts of failed cells by cell name.
type Failures = BTreeMap<String, String>;

fn record(failures: &mut Failures, cell: &Cell, result: Result<()>) {
    if let Err(error) = result {
        let text = failures.entry(cell.to_string()).or_default();
        text.push_str(&format!("\n    {error:#}"));
    }
}

/// Sends the request of each cell, and checks responses, access log and wire.
fn check_cells(
    lab: &Lab,
    detector: &Detector,
    cells: &[Cell],
    failures: &mut Failures,
) -> Vec<Request> {
    let mut requests = Vec::new();
    for (index, cell) in cells.iter().enumerate() {
        match matrix::request(lab, *cell, index) {
            Ok(request) => requests.push(request),
            Err(error) => record(failures, cell, Err(error)),
        }
    }
    for request in &requests {
        let cell = &request.cell;
        record(failures, cell, matrix::check_request(lab, request));
        record(failures, cell, matrix::check_wire(detector, request));
    }
    requests
}

fn report(failures: Failures, cells: usize) {
    let text: Vec<String> = failures
        .iter()
        .map(|(cell, errors)| format!("  {cell}:{errors}"))
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {cells} cells fail:\n{}",
        text.len(),
        text.join("\n")
    );
}

#[test]
fn meshed_pods_communicate_encrypted_and_all_others_in_plaintext() {
    let lab = Lab::up(matrix::manifests(), Options::default()).unwrap();
    let detector = Detector::start(&lab).unwrap();
    let cells = Cell::all();
    let mut failures = Failures::new();
    let requests = check_cells(&lab, &detector, &cells, &mut failures);
    // A pair of pods has six cells: two families, three destinations.
    for pair in requests.chunk_by(|x, y| {
        x.cell.client_pod() == y.cell.client_pod() && x.cell.server_pod() == y.cell.server_pod()
    }) {
        let (cell, count) = (&pair[0].cell, u32::try_from(pair.len()).unwrap());
        record(&mut failures, cell, matrix::check_counts(&lab, cell, count));
    }
    report(failures, cells.len());
    lab.down().unwrap();
}

/// Checks lab and detector themselves: without daemons everything works and is captured in plaintext.
#[test]
fn detector_finds_all_traffic_of_a_lab_without_daemons() {
    let lab = Lab::up(matrix::manifests(), Options::without_daemons()).unwrap();
    let detector = Detector::start(&lab).unwrap();
    let cells: Vec<Cell> = Cell::all()
        .into_iter()
        .filter(|cell| !cell.client_meshed && !cell.server_meshed)
        .collect();
    let mut failures = Failures::new();
    check_cells(&lab, &detector, &cells, &mut failures);
    report(failures, cells.len());
    lab.down().unwrap();
}
