//! The second line: rules in the node's namespace that drop what capture should have caught.
