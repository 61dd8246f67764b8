"""The networks that DiCo is compared with; docs/networks.md says where their code comes from."""
