"Seed data and the micro base."
