"""Who speaks, and what they may do: certificates, invitations, the role table, the audit log."""
