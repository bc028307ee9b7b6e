//! Which pods of this node are in the mesh, and the steps that bring them in and let them go.
