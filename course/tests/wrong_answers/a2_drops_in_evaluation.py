# Fails with: In evaluation no token is dropped
from course.tests.solutions.a2 import Switch as Right


class Switch(Right):
    def gate(self, *args):
        return super(Switch, self.train()).gate(*args)
