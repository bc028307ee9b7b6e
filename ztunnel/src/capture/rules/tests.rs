use super::*;

fn redirection() -> Redirection {
    Redirection {
        node_addresses: ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.2"]
            .iter()
            .map(|ip| ip.parse().expect("an address"))
            .collect(),
        probe_ports: [8080, 9090].into(),
    }
}

#[test]
fn script_replaces_the_table_in_one_transaction() {
    let script = Rules::Redirect(redirection()).script();
    assert!(
        script.starts_with("add table inet ambit\ndelete table inet ambit\ntable inet ambit {\n")
    );
    assert!(script.ends_with("}\n"));
}

#[test]
fn redirect_rules_of_a_meshed_pod() {
    let expected = r#"  chain separate {
    type filter hook output priority raw; policy accept;
    oifname "lo" meta mark & 0xfff == 0x539 tcp sport != { 15001, 15006, 15008 } ct original zone set 1337
  }
  chain mark_connection {
    type filter hook prerouting priority mangle; policy accept;
    iifname "lo" meta mark & 0xfff == 0x539 ct mark set ct mark & 0xfffff000 | 0x111
  }
  chain mark_answer {
    type route hook output priority mangle; policy accept;
    ct mark & 0xfff == 0x111 meta mark set ct mark
  }
  set node_ipv4 {
    type ipv4_addr
    elements = { 192.0.2.1, 192.0.2.2 }
  }
  set node_ipv6 {
    type ipv6_addr
    elements = { 2001:db8::1 }
  }
  set probe_ports {
    type inet_service
    elements = { 8080, 9090 }
  }
  chain redirect_inbound {
    type nat hook prerouting priority dstnat; policy accept;
    meta mark & 0xfff == 0x539 accept
    ip saddr @node_ipv4 tcp dport @probe_ports accept
    ip6 saddr @node_ipv6 tcp dport @probe_ports accept
    tcp dport != 15008 tcp flags & (fin | syn | rst | ack) == syn redirect to :15006
  }
  chain redirect_outbound {
    type nat hook output priority -100; policy accept;
    meta mark & 0xfff == 0x539 accept
    oifname "lo" accept
    ip6 daddr fe80::/10 accept
    tcp flags & (fin | syn | rst | ack) == syn redirect to :15001
  }
"#;
    assert_eq!(Rules::Redirect(redirection()).to_string(), expected);
}

#[test]
fn redirection_without_exceptions_has_empty_sets() {
    let text = Rules::Redirect(Redirection::default()).to_string();
    assert!(text.contains("set probe_ports {\n    type inet_service\n  }"));
    assert!(!text.contains("elements"));
}

#[test]
fn return_path_has_marks_and_empty_nat_chains() {
    let text = Rules::ReturnPath.to_string();
    assert!(text.contains("chain mark_answer"));
    assert!(text.contains("chain redirect_inbound {\n    type nat hook prerouting priority dstnat; policy accept;\n  }"));
    assert!(text.contains(
        "chain redirect_outbound {\n    type nat hook output priority -100; policy accept;\n  }"
    ));
    assert!(!text.contains("redirect to"));
}
